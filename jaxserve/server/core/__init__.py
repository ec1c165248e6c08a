"""The engine in a process of its own, and the coroutines' side of it: typed messages over a local socket."""
