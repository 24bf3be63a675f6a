"""How many GPUs: of a workload by a program, of a trace by a bound and by replay."""
