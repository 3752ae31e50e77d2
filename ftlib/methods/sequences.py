"""Tags that depend on their neighbors: which may follow which (BIO), the best path (Viterbi), a linear-chain CRF.

A path of tags y over the words of a row has the score  start[y1] + sum logits[t, yt] + sum transition[y(t-1), yt] +
end[yn]; its probability in a CRF is softmax over all paths.  `transitions` is (start, transition, end) everywhere:
float (labels,), (labels of the word before, labels), (labels,).

To copy: this file, core/batches.py, tasks/tagging.py, tasks/classification.py and torch.
Source: Lafferty et al. 2001 (CRFs); Rabiner 1989 (forward algorithm, Viterbi); Lample et al. 2016 (arXiv:1603.01360).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.batches import IGNORE, refuse
from ..tasks.tagging import closes, may_follow

Transitions = tuple[Tensor, Tensor, Tensor]


def bio_transitions(names: Sequence[str]) -> Transitions:
    """Scores that let only right BIO pass, or BIOES where names begin with E- or S-: 0 where allowed, else -inf.

    names: of the labels, in the order of their numbers.  Raises ValueError for a name of another form, and for a label
    that nothing may begin: I-city without B-city (IOB1).

    >>> bio_transitions(["O", "B-city", "I-city"])[1]
    tensor([[0., 0., -inf],
            [0., 0., 0.],
            [0., 0., 0.]])
    """
    closed, begun = closes(names), {name[2:] for name in names if name[:2] in ("B-", "S-")}
    if lone := sorted({name[2:] for name in names if name != "O"} - begun):
        raise ValueError(f"among the labels {list(names)} is no 'B-{lone[0]}', so that no entity of it could begin")
    allowed = [[may_follow(a, b, closed) for b in ("O", *names)] for a in ("O", *names)]  # "O": before and after all
    scores = torch.tensor(allowed).float().log()  # log 1 = 0, log 0 = -inf
    return scores[0, 1:], scores[1:, 1:], scores[1:, 0]


def _words(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where the mask is True, moved to the left; their places, both (batch, steps, ...); and which are real."""
    steps = int(mask.sum(1).max()) if mask.numel() else 0
    places = mask.int().argsort(dim=1, descending=True, stable=True)[:, :steps]  # (batch, steps)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[2]))  # (batch, steps, labels)
    return logits, places, mask.gather(1, places)


@torch.no_grad()
def viterbi(logits: Tensor, transitions: Transitions, mask: Tensor | None = None) -> Tensor:
    """The path with the highest score of every row, int64 (batch, tokens); of equal ones that of the lowest numbers.

    logits: float (batch, tokens, labels).  mask: bool (batch, tokens), False for tokens that are no word's first piece
    and for padding: the path leaves them out, and they get -100.  Lowest numbers: of the last word's label, then of the
    one before, and so on.  Raises ValueError for transitions that are not of these labels.

    >>> only_bio = bio_transitions(["O", "B-city", "I-city"])
    >>> viterbi(torch.tensor([[[0.9, 0.8, 0.0], [0.0, 0.1, 2.0]]]), only_bio)
    tensor([[1, 2]])
    """
    labels = logits.shape[-1]
    if (shapes := [tuple(t.shape) for t in transitions]) != [(labels,), (labels, labels), (labels,)]:
        raise ValueError(f"transitions have the shapes {shapes}, the logits {labels} labels; make them of the same")
    mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask
    logits, places, real = _words(logits, mask)
    start, transition, end = (t.to(logits) for t in transitions)
    paths = torch.full(mask.shape, IGNORE, device=logits.device)
    if not places.numel():
        return paths
    score, sources, same = start + logits[:, 0], [], torch.arange(labels, device=logits.device)  # score (batch, labels)
    for t in range(1, logits.shape[1]):
        best, source = (score[:, :, None] + transition).max(dim=1)  # over the label before; the first of equal ones
        score = torch.where(real[:, t, None], best + logits[:, t], score)
        sources.append(torch.where(real[:, t, None], source, same))
    path = [(score + end).argmax(1)]  # (batch,) each, backwards
    for source in reversed(sources):
        path.append(source.gather(1, path[-1][:, None])[:, 0])
    return paths.scatter(1, places, torch.where(real, torch.stack(path[::-1], 1), IGNORE))


class CRF(nn.Module):
    """A linear-chain conditional random field on a tagger's logits.

    Its transitions start at 0, where the loss is the tokens' cross-entropy.  As a part of a model with one head they
    are trained, kept in checkpoints and gone on with; at the small rate of a pretrained encoder they would hardly move:

        model.crf = CRF(model.config.num_labels)
        ftlib.tune(model, "full")  # or "lora", ...
        model.tuning.scales |= {f"crf.{name}": 100.0 for name, _ in model.crf.named_parameters()}  # times the rate
        ftlib.fit(model, train, loss=model.crf.forward, config=...)
        crf = model.crf
        del model.crf  # `save` writes stock models
        ftlib.save(model, folder)
        safetensors.torch.save_file(crf.state_dict(), folder / "crf.safetensors")

    `viterbi` and `entities(..., transitions=crf.transitions)` decode by it; `evaluate`, and fit's metrics but the loss,
    by the logits alone.  Several processes (torchrun) are refused: its gradients would not be exchanged.
    """

    def __init__(self, labels: int):
        super().__init__()
        self.start, self.end = nn.Parameter(torch.zeros(labels)), nn.Parameter(torch.zeros(labels))
        self.transition = nn.Parameter(torch.zeros(labels, labels))  # from the label before to the label

    @property
    def transitions(self) -> Transitions:
        return self.start, self.transition, self.end

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log p(labels), summed over the rows: scalar, float32 (float64 for such logits).

        logits: float (batch, tokens, labels); labels: int64 (batch, tokens), -100 for tokens that the chain leaves out.
        """
        several = torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1
        refuse((several, "a CRF trains in one process: torchrun's would not exchange its gradients"))
        logits, places, real = _words(logits, labels != IGNORE)
        if not places.numel():
            return logits.sum()  # 0
        start, transition, end = (t.to(logits) for t in self.transitions)
        tags = labels.gather(1, places).masked_fill(~real, 0)  # (batch, steps)
        own = torch.where(real, logits.gather(2, tags[..., None])[..., 0], 0.0)  # (batch, steps)
        moves = torch.where(real[:, 1:], transition[tags[:, :-1], tags[:, 1:]], 0.0)
        last = tags.gather(1, (real.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]  # (batch,)
        path = start[tags[:, 0]] + own.sum(1) + moves.sum(1) + end[last]  # (batch,)
        score = start + logits[:, 0]  # (batch, labels): log of the sum over all paths to here
        for t in range(1, logits.shape[1]):
            onward = torch.logsumexp(score[:, :, None] + transition, dim=1) + logits[:, t]
            score = torch.where(real[:, t, None], onward, score)
        loss = torch.logsumexp(score + end, dim=1) - path
        return torch.where(real[:, 0], loss, 0.0).sum()
