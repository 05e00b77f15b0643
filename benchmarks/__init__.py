"""Measures shmplasma side by side with its peers; `scripts/bench` runs it and `docs/benchmarks.md` is its result.

One worker process for each peer, all alive at once, each with its own server.  A round asks every worker for one case before
it goes on to the next case, so that a slow minute of the machine falls on all peers alike.  The report has the
medians over all rounds.
"""
