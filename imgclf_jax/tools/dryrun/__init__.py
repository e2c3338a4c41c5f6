"""dryrun: what a run would need of chips that are not here, by their compilers."""
