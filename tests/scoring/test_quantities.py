"""Collision, entropy and divergence of next-token distributions: the head in chunks against full logits in float64."""

from itertools import combinations
from math import log

import pytest
import torch
from torch import nn

import alignment.scoring.head
from alignment.losses import Quantity
from alignment.scoring.head import Likeliest, LogitTransform, OtherModel, likeliest_tokens, score_hidden
from alignment.scoring.layout import FlatLayout, SharedLayout
from alignment.scoring.logps import hidden_states, score_tokens
from alignment.scoring.prompt_sharing import choose_layout
from alignment.scoring.token_scores import TokenScores
from tests.conftest import random_groups, tiny_policy

TOKENS, WIDTH, VOCABULARY, LIKELIEST = 11, 6, 23, 5
COMPARED = (Quantity.forward_kl, Quantity.divergence)
"""Of two models; a loss asks for one of them at most."""
EVERYTHING = frozenset(Quantity) - {Quantity.forward_kl}
SUBSETS = [frozenset(chosen) for k in range(4) for chosen in combinations(sorted(EVERYTHING, key=str), k)]
SUBSETS += [frozenset({Quantity.forward_kl}), EVERYTHING - {Quantity.divergence} | {Quantity.forward_kl}]
TRANSFORMS = {"plain": LogitTransform(), "scaled": LogitTransform(scale=0.25), "capped": LogitTransform(cap=2.0)}
ROUTES = ["frozen head", "trained head", "head of another kind"]

every_subset = pytest.mark.parametrize(
    "quantities", SUBSETS, ids=lambda s: "+".join(q.name for q in Quantity if q in s) or "none"
)
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
every_route = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture(autouse=True, params=[1, 4, 100], ids=lambda n: f"chunks of {n}")
def chunk(request, monkeypatch):
    """Tokens whose logits exist at one time."""
    monkeypatch.setitem(alignment.scoring.head.LOGITS_PER_CHUNK, "cpu", request.param * VOCABULARY)
    return request.param


class OwnHead(nn.Module):
    """A head that is no linear layer, as of a quantised model: it cannot be differentiated by hand."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features = VOCABULARY
        self.linear = nn.Linear(WIDTH, VOCABULARY, dtype=weight.dtype)
        self.linear.load_state_dict({"weight": weight, "bias": bias})
        self.requires_grad_(False)

    def forward(self, hidden):
        return self.linear(hidden)


class Case:
    """A head, hidden states of two models, targets: the same numbers in any dtype."""

    def __init__(self, route="frozen head", dtype=torch.float64, spread=1.0):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return spread * torch.randn(shape, generator=generator, dtype=torch.float64)

        self.head, self.other_head = (
            nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64).requires_grad_(False) for _ in range(2)
        )
        for head in (self.head, self.other_head):
            head.weight.copy_(draw(VOCABULARY, WIDTH))
            head.bias.copy_(draw(VOCABULARY))
        self.head, self.other_head = self.head.to(dtype), self.other_head.to(dtype)
        if route == "head of another kind":
            self.head = OwnHead(self.head.weight, self.head.bias)
        self.head.requires_grad_(route == "trained head")
        self.hidden = draw(TOKENS, WIDTH).to(dtype).requires_grad_()
        self.other = draw(TOKENS, WIDTH).to(dtype)
        self.targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
        self.leaves = [self.hidden, *(p for p in self.head.parameters() if p.requires_grad)]

    def found(self, quantities, transform=TRANSFORMS["plain"]):
        """(rows, tokens) by the code under test."""
        other = OtherModel(self.other_head, self.other) if Quantity.divergence in quantities else None
        if Quantity.forward_kl in quantities:
            logps, ids = transform(self.other_head(self.other)).log_softmax(-1).topk(LIKELIEST)
            other = Likeliest(ids, logps)
        return score_hidden(self.head, self.hidden, self.targets, transform, quantities, other)

    def expected(self, quantities, transform=TRANSFORMS["plain"]):
        """The same rows in float64, from all logits at once and by definition."""
        logits = transform(self.head(self.hidden)).double()
        with torch.no_grad():
            q = transform(self.other_head(self.other)).double().log_softmax(-1)
        return by_definition(logits, q, self.targets, quantities)


def forward_kl(q, p):
    """Over the likeliest tokens of one position's log-probs q, one after the other."""
    return sum(q[v].exp() * (q[v] - p[v]) for v in q.argsort()[-LIKELIEST:])


def by_definition(logits, q, targets, quantities):
    """Rows from full logits of the policy and log-probs q of the other model, both in float64."""
    p = logits.softmax(-1)
    at = targets[:, None]
    rows = [p.log().gather(1, at).squeeze(1)]
    if Quantity.collision in quantities:
        rows.append((p.detach() ** 2).sum(-1).log())
    if Quantity.entropy in quantities:
        rows.append(torch.distributions.Categorical(probs=p.detach()).entropy() / log(p.shape[-1]))
    if Quantity.forward_kl in quantities:
        rows.append(torch.stack([forward_kl(*both) for both in zip(q, p.log(), strict=True)]))
    if Quantity.divergence in quantities:
        own = torch.distributions.Categorical(logits=logits)
        rows.append(torch.distributions.kl_divergence(torch.distributions.Categorical(logits=q), own))
        rows.append(q.gather(1, at).squeeze(1))
    return torch.stack(rows)


@every_subset
@every_transform
@every_route
def test_values(quantities, transform, route):
    case = Case(route)
    expected = case.expected(quantities, transform).detach()
    torch.testing.assert_close(case.found(quantities, transform).detach(), expected, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(case.found(quantities, transform), expected, rtol=1e-12, atol=1e-13)


@every_subset
@every_transform
@every_route
def test_gradients(quantities, transform, route):
    """Of any weighing of the rows, for the hidden states and, where it trains, for the head."""
    case = Case(route)
    found, expected = case.found(quantities, transform), case.expected(quantities, transform)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, plain = (torch.autograd.grad((weights * rows).sum(), case.leaves) for rows in (found, expected))
    assert len(ours) == (3 if route == "trained head" else 1)
    for one, other in zip(ours, plain, strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@every_route
@pytest.mark.parametrize("compared", COMPARED, ids=lambda quantity: quantity.name)
def test_what_compares_alone_has_a_gradient_and_the_other_rows_beside_it_none(compared, route):
    everything = EVERYTHING - {Quantity.divergence} | {compared}
    case = Case(route)
    found = TokenScores(case.found(everything), everything)

    def gradient(row):
        (hidden,) = torch.autograd.grad(row.sum(), case.hidden, retain_graph=True)
        return hidden.abs().max().item()

    assert gradient(found[compared]) > 1e-2
    others = [found.other_logps] if compared is Quantity.divergence else []
    for row in (found[Quantity.collision], found[Quantity.entropy], *others):
        assert gradient(row) == 0


@every_subset
def test_each_name_gives_its_own_row(quantities):
    """Whatever else was asked for, each quantity has the value that it has when asked for alone."""
    case = Case()
    found = TokenScores(case.found(quantities).detach(), quantities)
    torch.testing.assert_close(found.logps, case.found(frozenset())[0].detach(), rtol=1e-13, atol=0)
    assert set(found.by_quantity()) == quantities
    assert len(found.values) == 1 + len(quantities) + (Quantity.divergence in quantities)
    for quantity, row in found.by_quantity().items():
        alone = case.found(frozenset({quantity})).detach()
        torch.testing.assert_close(row, alone[1], rtol=1e-13, atol=0)
        torch.testing.assert_close(found[quantity], row, rtol=0, atol=0)
        if quantity is Quantity.divergence:
            torch.testing.assert_close(found.other_logps, alone[2], rtol=1e-13, atol=0)
    for fewer in (subset for subset in SUBSETS if subset <= quantities):
        torch.testing.assert_close(
            found.select(fewer).values, case.found(fewer).detach(), rtol=1e-13, atol=0, check_stride=False
        )
    first, second = found.split([4, TOKENS - 4])
    assert torch.equal(torch.cat([first.logps, second.logps]), found.logps)


@every_route
def test_a_model_does_not_diverge_from_itself(route):
    case = Case(route)
    case.other_head, case.other = case.head, case.hidden.detach()
    found = case.found(frozenset({Quantity.divergence}))
    assert found[1].abs().max() < 1e-15
    torch.testing.assert_close(found[2], found[0].detach(), rtol=1e-15, atol=0)
    (gradient,) = torch.autograd.grad(found[1].sum(), case.hidden)
    assert gradient.abs().max() < 1e-15


def uniform_or_sure(sure, dtype=torch.float32):
    """A head whose distribution is uniform, or wholly on one token."""
    head = nn.Linear(WIDTH, VOCABULARY, bias=True, dtype=dtype).requires_grad_(False)
    head.weight.zero_()
    head.bias.zero_()
    if sure:
        head.bias[3] = 500.0
    return head


def test_the_ends_of_their_ranges():
    """Collision and entropy are -log V and 1 of a uniform distribution, 0 and 0 of a sure one, in float32 too.

    From uniform to sure, sure having e^-500 for the other 22 of 23: KL = 22/23 * 500 - log 23 nats. Back: log 23.
    """
    hidden, targets = torch.ones(5, WIDTH, requires_grad=True), torch.tensor([0, 3, 3, 1, 2])
    everything = EVERYTHING
    expected = {False: (-log(23), 1.0, log(23)), True: (0.0, 0.0, 22 / 23 * 500 - log(23))}
    for sure, values in expected.items():
        other = OtherModel(uniform_or_sure(not sure), hidden.detach())
        found = score_hidden(uniform_or_sure(sure), hidden, targets, LogitTransform(), everything, other)
        for row, value in zip(found[1:4], values, strict=True):
            assert row.tolist() == pytest.approx([value] * 5, rel=1e-6, abs=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), hidden)
        assert torch.isfinite(gradient).all()


@every_route
@pytest.mark.parametrize(("spread", "tolerance"), [(1.0, 1e-5), (6.0, 1e-4)])
def test_float32_of_usual_and_of_extreme_logits(route, spread, tolerance):
    """At a spread of 6 logits reach 500: most log-probs are below what exp can represent."""
    everything = EVERYTHING
    case = Case(route, torch.float32, spread)
    exact = Case(route, torch.float64, spread)
    exact.head.load_state_dict(case.head.state_dict())
    exact.other_head.load_state_dict(case.other_head.state_dict())
    exact.hidden.data, exact.other = case.hidden.detach().double(), case.other.double()
    found, expected = case.found(everything), exact.found(everything)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    if spread > 1:
        assert expected[0].min() < -120
    ours, plain = (
        torch.autograd.grad(rows[[0, 3]].sum(), c.hidden)[0] for rows, c in ((found, case), (expected, exact))
    )
    torch.testing.assert_close(ours.double(), plain, rtol=10 * tolerance, atol=10 * tolerance)


def test_a_half_precision_head_gives_float32():
    """Its logits are rounded; what is made of them is not."""
    case = Case(dtype=torch.bfloat16)
    everything = EVERYTHING
    found = case.found(everything)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), case.expected(everything), rtol=1e-5, atol=1e-5)


@every_route
@pytest.mark.parametrize(("quantities", "rows"), [(frozenset(), 1), (EVERYTHING, 2)], ids=["none", "all"])
def test_nothing_of_the_vocabularys_width_is_kept(route, quantities, rows, chunk):
    """For the backward pass a hidden state's width per token and row with a gradient; at one time a chunk's logits."""
    case, kept, logits = Case(route), [], []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    for head in (case.head, case.other_head):
        head.register_forward_hook(lambda module, given, result: logits.append(tuple(result.shape)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.found(quantities)
    weights = {p.data_ptr() for p in case.head.parameters()}
    wide = [t.shape for t in kept if t.data_ptr() not in weights and t.numel() > rows * TOKENS * WIDTH]
    assert not wide
    passes = -(-TOKENS // min(chunk, TOKENS))
    assert len(logits) == rows * passes
    assert max(tokens for tokens, _ in logits) <= chunk


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FlatLayout, SharedLayout])
@pytest.mark.parametrize("prompts", [False, True], ids=["completions", "prompts too"])
def test_through_a_model_with_its_adapter_off_as_the_other(kind, prompts):
    """KL(base || adapted), collision and entropy of every scored token, and the adapter's gradient of all of it.

    Expected are the full logits of one row per completion.
    """
    model = tiny_policy(trained=True)
    layout = choose_layout(model, torch.device("cpu")) if kind is SharedLayout else FlatLayout()
    assert isinstance(layout, kind)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups, everything = random_groups(4, seed=3), EVERYTHING
    generator = torch.Generator().manual_seed(2)
    found_gradient, expected_gradient = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for batch in layout.batches(groups, 60, prompts):
        with model.disable_adapter():
            other = OtherModel(model.get_output_embeddings(), hidden_states(model, batch))
        found = score_tokens(model, batch, everything, other).values
        texts = [(groups[i].prompt, c) for i in batch.indices for c in groups[i].completions]
        rows = [row_of(model, p, c, range(len(p) - 1, len(p) + len(c) - 1), everything) for p, c in texts]
        if prompts:
            firsts = [(groups[i].prompt, groups[i].completions[0]) for i in batch.indices]
            rows += [row_of(model, p, c, range(len(p) - 1), everything) for p, c in firsts]
        expected = torch.cat(rows, dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        assert found[3].min() > 0
        weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        for gradient, values in ((found_gradient, found), (expected_gradient, expected)):
            for total, part in zip(gradient, torch.autograd.grad((weights * values).sum(), parameters), strict=True):
                total += part
    for found, expected in zip(found_gradient, expected_gradient, strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-5 * expected.norm()  # Qwen3's norms work in fp32


def row_of(model, prompt, completion, positions, quantities):
    """(rows, positions) by definition, from the logits at these positions of one text."""
    ids = torch.tensor([*prompt.tolist(), *completion.tolist()])
    at = torch.tensor(list(positions), dtype=torch.int64)
    logits = model(input_ids=ids[None]).logits[0]
    with torch.no_grad(), model.disable_adapter():
        q = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return by_definition(logits[at], q[at], ids[at + 1], quantities)


@every_transform
@pytest.mark.parametrize("size", [VOCABULARY, 9])
def test_the_likeliest_tokens_are_those_of_the_full_logits(transform, size):
    """Of all tokens, or of those with the smallest ids; with the targets' log-probs in front. The forward KL over all
    of a vocabulary is the divergence."""
    case = Case()
    found = likeliest_tokens(case.head, case.hidden.detach(), case.targets, transform, LIKELIEST, size)
    full = transform(case.head(case.hidden.detach())).log_softmax(-1)
    assert found.shape == (1 + 2 * LIKELIEST, TOKENS)
    torch.testing.assert_close(found[0], full.gather(1, case.targets[:, None]).squeeze(1), rtol=1e-13, atol=0)
    best = full[:, :size].sort(descending=True)
    assert torch.equal(found[1 + LIKELIEST :].T.long(), best.indices[:, :LIKELIEST])
    torch.testing.assert_close(found[1 : 1 + LIKELIEST].T, best.values[:, :LIKELIEST], rtol=1e-13, atol=0)
    q = transform(case.other_head(case.other)).log_softmax(-1)
    whole = Likeliest(torch.arange(VOCABULARY).expand(TOKENS, -1), q)
    kl = score_hidden(case.head, case.hidden, case.targets, transform, frozenset({Quantity.forward_kl}), whole)[1]
    torch.testing.assert_close(kl, case.found(frozenset({Quantity.divergence}), transform)[1], rtol=1e-12, atol=1e-13)
