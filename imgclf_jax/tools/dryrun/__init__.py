"""dryrun: memory and time of a run, by ahead-of-time compilation for absent hardware."""
