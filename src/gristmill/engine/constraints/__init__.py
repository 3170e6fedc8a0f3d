"""Outputs that follow a schema, an expression, a grammar or a list of choices."""
