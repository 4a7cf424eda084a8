# SPDX-License-Identifier: Apache-2.0
"""Running vLLM with this plugin beyond one process: see README.md in this folder."""
