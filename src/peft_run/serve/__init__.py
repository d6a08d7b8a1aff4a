"""`peft serve`: one base model in memory, many adapters, each request with its own.

cache.py        keys and values of the requests that run, one row each
reading.py      prompts of several requests, read in one forward
prefixes.py     what was read of beginnings that prompts share
adapters.py     which adapters there are, and which of them are in memory
text.py         tokens to text, a piece at a time, and where a stop string ends it
sampling.py     one row's next token
worker.py       the thread in which all that touches a model is done
engine.py       the worker that writes: requests join and leave between steps, all of them share each step
heads.py        runs with an output layer: labels, tags and spans
service.py      names, templates and limits: from what a client asks to what the engine runs
start.py        a service from the command line
schema.py       what clients may send
answers.py      what they get
running.py      one client's request while the engine works on it
connections.py  what a connection may take until it has asked
gate.py         key, sizes and times, before anything is parsed
metrics.py      counters as Prometheus reads them
api.py          the routes
"""
