"""The HTTP service: OpenAI's images API over one engine for each model. Needs the extra `serve`."""
