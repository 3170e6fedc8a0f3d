"""Several tokens a step: drafts proposed cheaply and verified exactly."""
