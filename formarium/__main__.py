"""`python -m formarium` is the `formarium` command."""

from formarium.cli import main

main()
