"""What all clients ask."""

from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "Hi"}]
SUM = [{"role": "user", "content": "What is 2 + 3?"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class City(BaseModel):
    """A city and how many millions live there."""

    city: str
    millions: int
