"""What layers get as inputs while a user's function runs the model: for starts that are made from data."""

from peft.errors import ConfigError


def mean_of_inputs(model, layers, run_model, of):
    """{layer name: the mean of of(x) over the batches}, with x (tokens, in) what the layer gets while run_model() runs.

    Raises ConfigError for a mean that is not finite, and for layers that were not run.
    """
    sums, batches = {}, dict.fromkeys(layers, 0)

    def hook(name):
        def add(module, args):
            value = of(args[0].detach().flatten(0, -2))
            if not value.isfinite().all():
                raise ConfigError(
                    f"The inputs of {name} give a covariance that is not finite; look at the sample data."
                )
            sums[name] = sums[name].add_(value) if name in sums else value
            batches[name] += 1

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        run_model()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if unused := [n for n in layers if not batches[n]]:
        raise ConfigError(f"run_model did not run the layers {unused[:5]}: give samples of what they are for.")
    return {n: s / batches[n] for n, s in sums.items()}
