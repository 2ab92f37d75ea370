"""The server: OpenAI's HTTP interface in front of the engine."""
