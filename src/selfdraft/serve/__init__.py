"""The server: an OpenAI-shaped HTTP interface in front of one engine. Needs the extra `serve`."""
