# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of all operators share."""
