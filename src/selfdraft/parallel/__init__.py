"""Several processes, the ranks, that decode one text together: who is there, and what each of them computes."""

from selfdraft.parallel.ranks import Ranks as Ranks
from selfdraft.parallel.ranks import join as join
