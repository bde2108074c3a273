"""`python -m mmgem`, the same as the command `mmgem`."""

from mmgem.training.cli import app

app(prog_name="mmgem")
