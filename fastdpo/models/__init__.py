"""What turns a language model into hidden states and a head."""
