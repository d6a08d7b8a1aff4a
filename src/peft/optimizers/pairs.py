"""The pairs of factors in a model."""


def factor_pairs(named_parameters):
    """[(name of B, A, B)] of the LoRA factors of linear layers among (name, parameter) pairs."""
    parameters = dict(named_parameters)
    pairs = [
        (n, parameters.get(n.replace(".lora_B.", ".lora_A.")), p) for n, p in parameters.items() if ".lora_B." in n
    ]
    return [(n, A, B) for n, A, B in pairs if A is not None and A.ndim == B.ndim == 2]
