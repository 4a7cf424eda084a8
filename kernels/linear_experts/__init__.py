# SPDX-License-Identifier: Apache-2.0
"""A linear of every expert at once, each on the tokens that were sent to it."""
