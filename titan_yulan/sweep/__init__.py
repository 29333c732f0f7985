"""Many runs from one file: a base configuration and a grid of settings.

`expand` turns the file into names and settings, `runs` into checked configurations with what became of each, `local`
trains them on this machine, `slurm` writes a job array. Each is an ordinary run folder below one output folder.
"""
