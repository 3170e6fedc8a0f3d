"""Search for the best sequences: every method over one interface to next-token distributions."""
