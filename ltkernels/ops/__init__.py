"""The ops: schema, fake and autograd of every hot path."""
