"""posttrain beside TRL and transformers: the same work on the same machine in the same run (`make bench`)."""
