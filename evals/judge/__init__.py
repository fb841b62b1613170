"""Who says how good an answer is: a server, a checkpoint, or judgements that were made before."""
