"""`peft serve`: one base model in memory, many adapters, each request with its own.

cache.py     keys and values of the requests that run, one row each
adapters.py  which adapters there are, and which of them are in memory
text.py      tokens to text, a piece at a time, and where a stop string ends it
sampling.py  one row's next token
engine.py    the loop: requests join and leave between steps, all of them share each step
service.py   names, templates and limits: from what a client asks to what the engine runs
schema.py    what clients may send
answers.py   what they get
running.py   one client's request while the engine works on it
gate.py      key, sizes and times, before anything is parsed
metrics.py   counters as Prometheus reads them
api.py       the routes
"""
