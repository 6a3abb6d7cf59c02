"""Files of the user: token logs, memories, skip sets, prompts. A file is written whole or not at all."""
