"""The step, who goes next, and the two loops that drive it. Knows drafters and models only through their seams."""
