"""Facts about a network that forward passes need; computed once per network."""

from functools import cached_property
from itertools import accumulate
from weakref import WeakKeyDictionary

from ..models.interface import Backbone
from ..uem import Exits
from .branch_plan import Branches
from .output import Costs

# Tokens per group of lanes in a block call on the CPU: enough for matrix products at full rate, few enough that a
# product's output is still in the cache when the next one reads it. Rows are independent inside a block.
CPU_GROUP_TOKENS = 2048


class Structure:
    """Facts about a network. blocks; num_layers: L; skips: indices of the blocks whose output a later block joins;
    group_size: lanes per block call on a CPU."""

    def __init__(self, backbone: Backbone):
        self.blocks = tuple(backbone.blocks)
        self.num_layers = len(self.blocks)
        self.skips = frozenset(block.skip_from for block in self.blocks) - {None}
        self.group_size = max(1, round(CPU_GROUP_TOKENS / backbone.tokens))
        self._block_macs = [block.macs(backbone.tokens) for block in self.blocks]
        self._ends = sum(backbone.stem_and_head_macs())
        self._tokens, self._patches = backbone.tokens, backbone.tokens - backbone.num_prefix_tokens
        self._last: tuple[Exits | None, frozenset[int], Costs] | None = None

    @cached_property
    def branches(self) -> Branches:
        return Branches.of(self.blocks, self._tokens)

    def costs(self, exits: Exits | None, scored: frozenset[int]) -> Costs:
        """Costs of a pass. scored: layers whose score is computed. The last result is cached: consecutive passes are
        mostly alike."""
        if self._last is not None and self._last[0] is exits and self._last[1] == scored:
            return self._last[2]
        score = exits.macs(self._tokens - exits.num_prefix_tokens) if exits is not None and scored else 0
        head = 0 if exits is None else exits.head_macs(self._patches)
        each = [macs + score * (layer in scored) for layer, macs in enumerate(self._block_macs, start=1)]
        *inner, last = (self._ends + macs for macs in accumulate(each, initial=0))
        by_exit_layer = ((*(macs + head for macs in inner), last),)
        found = Costs(sum(self._block_macs) + self._ends, by_exit_layer, own_head=(head,))
        self._last = exits, scored, found
        return found


_structures: WeakKeyDictionary[Backbone, Structure] = WeakKeyDictionary()


def structure_of(backbone: Backbone) -> Structure:
    found = _structures.get(backbone)
    if found is None or found.blocks != tuple(backbone.blocks):  # blocks may have been replaced
        found = _structures[backbone] = Structure(backbone)
    return found
