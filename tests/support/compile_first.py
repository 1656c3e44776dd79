"""Compile what the host does beside a GPU, which tests interpret: `python -m tests.support.compile_first`.

`make test` does so before the tests, and CI on one core while the checks take the other. Else both workers of the tests
compile it side by side, most of a minute each, since numba does not know that another process is at it; and a test's
limit of time that falls into that leaves a library that is not finished. The rest is compiled by `make setup`.
"""

from prescope.engine.graph.warm import compile_host_parts

if __name__ == "__main__":
    compile_host_parts()
