"""A text game with a sparse reward: fetch the key in a corridor, then open the door with it.

Each turn the environment writes five characters, `2:k4.` (the agent at 2, the key still at 4) or `2:h5.` (the key in
hand, the door at 5), and the agent answers with one: `l`, `r`, `g` (grab), `o` (open). Only an opened door earns 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polrl.core.errors import KnobError
from polrl.models.causal_lm import CachedReader, draw
from polrl.models.tiny_lm import BOS, CONTEXT, PAD, encode
from polrl.worlds.text_tasks import Split, _check_request, held_out

LEFT, RIGHT, GRAB, OPEN = encode("lrgo")
ZERO = encode("0")[0]  # the digits' tokens follow each other
COLON, KEY, HELD, STOP = encode(":kh.")
OBSERVATION = 5  # tokens


@dataclass(frozen=True)
class Episodes:
    """Games that were played to their end, as sequences: `<bos>`, observation, action, observation, action ...

    Attributes
    ----------
    ids : Tensor, int64 [N, L]
        L is the length of the longest game; the others are padded on the right.
    mask : Tensor, float32 [N, L]
        1 on what was read or written, 0 on padding.
    action_mask : Tensor, float32 [N, L]
        1 on actions alone: what a loss or an entropy counts.
    reward : Tensor, float32 [N]
        1 for an opened door.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    action_mask: torch.Tensor
    reward: torch.Tensor


class CorridorGames:
    """A batch of games that go on in lock step; those that are over wait.

    Parameters
    ----------
    starts : sequence of (agent, key, door)
        Three different cells for each game.
    length : int
        Cells, 3 to 10.
    turns : int
        After so many a game is lost.
    device : str or torch.device

    Attributes
    ----------
    opened, over : Tensor, bool [N]
        Whether the door was opened; whether the game is over.
    """

    def __init__(
        self, starts: list[tuple[int, int, int]], length: int, turns: int, device: str | torch.device = "cpu"
    ) -> None:
        self.length, self.turns, self.turn = length, turns, 0
        self.agent, self.key, self.door = torch.tensor(starts, device=device).unbind(1)
        self.holding = torch.zeros_like(self.agent, dtype=torch.bool)
        self.opened, self.over = self.holding.clone(), self.holding.clone()

    def observe(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the environment writes, int64 [N, 5], and 1 where the game still goes on; `.....` elsewhere."""
        colon = torch.full_like(self.agent, COLON)
        stop = torch.full_like(self.agent, STOP)
        what = torch.where(self.holding, HELD, KEY)
        goal = ZERO + self._goal()
        ids = torch.stack([ZERO + self.agent, colon, what, goal, stop], dim=1)
        going = (~self.over)[:, None]
        return torch.where(going, ids, stop[:, None]), going.to(ids.dtype).expand_as(ids)

    def act(self, actions: torch.Tensor) -> None:
        """Let each game that goes on take an action, a token [N]; one without a meaning lets the turn pass."""
        moving = ~self.over
        step = (actions == RIGHT).long() - (actions == LEFT).long()
        self.agent = torch.where(moving, (self.agent + step).clamp(0, self.length - 1), self.agent)
        opens = moving & (actions == OPEN) & self.holding & (self.agent == self.door)
        self.holding = self.holding | (moving & (actions == GRAB) & (self.agent == self.key))
        self.opened = self.opened | opens
        self.turn += 1
        self.over = self.opened if self.turn < self.turns else torch.ones_like(self.over)

    def shortest(self) -> torch.Tensor:
        """Return the action of a shortest way to the open door, a token [N]."""
        goal = self._goal()
        there = torch.where(self.holding, OPEN, GRAB)
        return torch.where(self.agent == goal, there, torch.where(self.agent < goal, RIGHT, LEFT))

    def _goal(self) -> torch.Tensor:
        return torch.where(self.holding, self.door, self.key)


class Corridor:
    """The game's rules and its 120 starts (at length 6), of which about a tenth are held out as the split "test".

    Parameters
    ----------
    length : int
        Cells, 3 to 10.
    turns : int
        After so many a game is lost; as many as fit into the tiny model's context, 21.
    """

    def __init__(self, length: int = 6, turns: int = 12) -> None:
        if not 3 <= length <= 10:
            raise KnobError(f"length={length!r}; allowed: 3 to 10 cells")
        most = (CONTEXT - 1) // (OBSERVATION + 1)
        if not 1 <= turns <= most:
            raise KnobError(f"turns={turns!r}; allowed: 1 to {most}")
        self.length, self.turns = length, turns
        every = list(itertools.permutations(range(length), 3))
        self._starts = {split: [s for s in every if held_out(s) == (split == "test")] for split in ("train", "test")}

    def games(
        self, count: int, rng: np.random.Generator, split: Split = "train", device: str | torch.device = "cpu"
    ) -> CorridorGames:
        """Return games at random starts: agent, key and door in three different cells."""
        _check_request(count, split)
        members = self._starts[split]
        starts = [members[place] for place in rng.integers(len(members), size=count).tolist()]
        return CorridorGames(starts, self.length, self.turns, device)


@torch.no_grad()
def play(model: Any, games: CorridorGames, *, generator: torch.Generator, temperature: float = 1.0) -> Episodes:
    """Let a model play a batch of new games to their end, one forward pass a turn.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model over the tiny vocabulary.
    games : CorridorGames
        They are over afterwards.
    generator : torch.Generator
        On the games' device; gives N * turns numbers, however soon the games end.
    temperature : float
        0 takes the likeliest action.
    """
    noise = torch.rand(games.turns, len(games.agent), generator=generator, device=games.agent.device)
    was_training = model.training
    model.eval()
    try:
        return _play(CachedReader(model), games, lambda logits, turn: draw(logits, noise[turn], temperature))
    finally:
        model.train(was_training)


def play_noisily(games: CorridorGames, skill: float, generator: torch.Generator) -> Episodes:
    """Play with the shortest way's action with probability `skill`, and one of the four evenly otherwise."""
    moves = torch.tensor([LEFT, RIGHT, GRAB, OPEN], device=games.agent.device)

    def act(_: Any, __: int) -> torch.Tensor:
        shape, device = games.agent.shape, games.agent.device
        skilled = torch.rand(shape, generator=generator, device=device) < skill
        return torch.where(
            skilled, games.shortest(), moves[torch.randint(4, shape, generator=generator, device=device)]
        )

    return _play(None, games, act)


def _play(reader: CachedReader | None, games: CorridorGames, act: Any) -> Episodes:
    """Play on; `act` chooses from logits, which stay None without a reader, and the turn's number."""
    begin = torch.full_like(games.agent[:, None], BOS)
    pieces, masks, counts = [begin], [torch.ones_like(begin)], [torch.zeros_like(begin)]
    unread = 0  # the first piece that the reader has not read
    for turn in range(games.turns):
        seen, present = games.observe()
        pieces.append(seen)
        masks.append(present)
        counts.append(torch.zeros_like(seen))
        logits = None
        if reader is not None:
            logits = reader.read(torch.cat(pieces[unread:], dim=1), torch.cat(masks[unread:], dim=1))
            unread = len(pieces)
        going = present[:, :1]
        actions = act(logits, turn)
        pieces.append(torch.where(going == 1, actions[:, None], PAD))
        masks.append(going)
        counts.append(going)
        games.act(actions)
        if bool(games.over.all()):
            break
    mask = torch.cat(masks, dim=1).float()
    ids = torch.where(mask == 1, torch.cat(pieces, dim=1), PAD)
    return Episodes(ids, mask, torch.cat(counts, dim=1).float(), games.opened.float())
