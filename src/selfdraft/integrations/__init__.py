"""Our drafters inside other engines, through the interfaces that these engines offer."""
