"""Load on a server of OpenAI's API: many requests at once, from outside, over HTTP; nothing here loads a model."""
