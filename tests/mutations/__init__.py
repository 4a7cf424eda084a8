# SPDX-License-Identifier: Apache-2.0
"""Ways in which a lowbit checkpoint can be wrong; each has to be refused by name."""
