#!/usr/bin/env bash
# On a bare Debian or Ubuntu, as root: install what set-up and some tests ask for. Does nothing elsewhere; set-up then says what is
# missing, and those tests are skipped.
set -euo pipefail

missing=()
command -v c++ >/dev/null || missing+=(g++)
command -v python3 >/dev/null || missing+=(python3)
if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then missing+=(python3-venv); fi
if ! python3 -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null; then
    missing+=(python3-dev)
fi
command -v ip >/dev/null || missing+=(iproute2)  # two hosts on one machine: tests/test_elastic.py
PATH=$PATH:/usr/sbin  # daemons of tests/launch: a Slurm of one host, and hosts that ssh reaches
command -v slurmd >/dev/null || missing+=(slurm-wlm munge)
command -v sshd >/dev/null || missing+=(openssh-server openssh-client)
command -v pdsh >/dev/null || missing+=(pdsh)
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${missing[@]}"
fi
