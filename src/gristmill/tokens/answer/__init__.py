"""An answer's text taken apart: reasoning, content and tool calls, in the forms that chat templates write."""
