"""What the server reads and writes, as pydantic models: OpenAI's wire format and what others have added to it."""
