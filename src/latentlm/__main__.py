"""`python -m latentlm`: the command, as launchers of several processes start it."""

from latentlm.cli import main

main()
