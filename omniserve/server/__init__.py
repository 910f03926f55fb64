"""The HTTP server: OpenAI's wire format in front of an engine process."""
