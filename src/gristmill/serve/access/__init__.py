"""Who may use the server and how much, and what is recorded of it."""
