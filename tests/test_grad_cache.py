"""Two passes over chunks == one pass over the batch, with dropout replayed, on a toy encoder."""

import torch

from pipeline.model.grad_cache import two_pass_step


def run(chunks, dropout, model, keep_graphs=1):
    model.zero_grad()
    calls = []

    def encode(chunk):
        calls.append(torch.is_grad_enabled())
        return torch.nn.functional.dropout(model(chunk), dropout)

    def embedding_gradients(cached):
        leaves = [c.detach().requires_grad_() for c in cached]
        all_SD = torch.cat(leaves)
        loss = torch.logsumexp(all_SD @ all_SD.T, dim=1).mean()
        return loss.detach(), list(torch.autograd.grad(loss, leaves))

    seeds = [100 + i for i in range(len(chunks))]
    ends = []

    def backward(embeddings, gradient, is_last):
        ends.append(is_last)
        embeddings.backward(gradient)

    result = two_pass_step(chunks, seeds, encode, embedding_gradients, backward, keep_graphs)
    assert ends == [False] * (len(chunks) - 1) + [True]
    return result, [p.grad.clone() for p in model.parameters()], calls


def uncached(chunks, dropout, model):
    model.zero_grad()
    parts = []
    for i, chunk in enumerate(chunks):
        torch.manual_seed(100 + i)
        parts.append(torch.nn.functional.dropout(model(chunk), dropout))
    all_SD = torch.cat(parts)
    loss = torch.logsumexp(all_SD @ all_SD.T, dim=1).mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_gradients_equal_the_uncached_step_with_dropout():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4)).double()
    batch = torch.randn(12, 5, dtype=torch.float64)
    for sizes in ((12,), (5, 7), (1, 6, 2, 3)):
        for dropout in (0.0, 0.3):
            for keep_graphs in (1, 2, 3, 9):
                chunks = batch.split(sizes)
                result, gradients, _ = run(chunks, dropout, model, keep_graphs)
                loss, truth = uncached(chunks, dropout, model)
                torch.testing.assert_close(result.loss, loss)
                for gradient, expected in zip(gradients, truth, strict=True):
                    torch.testing.assert_close(gradient, expected)


def test_a_chunk_that_keeps_its_graph_makes_one_pass_and_the_others_two():
    model = torch.nn.Linear(5, 4)
    batch = torch.randn(8, 5)
    result, _, calls = run([batch], 0.0, model)
    assert result.num_passes == 1 and calls == [True]
    for keep_graphs, twice in ((1, 3), (2, 2), (4, 0), (9, 0)):
        result, _, calls = run(batch.split(2), 0.0, model, keep_graphs)
        assert result.num_passes == 4 + twice and calls == [False] * twice + [True] * 4
