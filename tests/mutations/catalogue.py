# SPDX-License-Identifier: Apache-2.0
"""Every mutation, in one list."""

from .configs import config_mutations
from .files import file_mutations
from .mutation import Mutation
from .tensors import tensor_mutations


def catalogue(codes: str = "weight_packed") -> list[Mutation]:
    """The list, for a format that calls its tensors of codes like this."""
    return [*tensor_mutations(codes), *file_mutations(), *config_mutations()]


CATALOGUE = catalogue()
