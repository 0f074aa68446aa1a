"""What a prediction made first, training can use."""

import torch

import formarium
from formarium.nn.kept import kept


def test_a_table_made_in_inference_mode_serves_a_training_step():
    @kept(4)
    def table(n):
        return torch.arange(n, dtype=torch.float32)

    with torch.inference_mode():
        first = table(3)
    assert not first.is_inference() and table(3) is first
    with torch.device("meta"):
        assert table(2).tolist() == [0, 1]
    x = torch.ones(3, requires_grad=True)
    (x * table(3)).sum().backward()
    assert x.grad.tolist() == [0, 1, 2]


def test_models_train_after_a_benchmark():
    for name in ("swin_unetr_micro", "vidt_micro", "mossformer_micro"):
        model = formarium.create(name)
        batch = model.example_batch(2)
        with torch.inference_mode():
            model.eval().predict(batch)
        model.train().loss(batch).total.backward()
