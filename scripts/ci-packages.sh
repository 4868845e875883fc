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
wanted=()  # by single tests, which are skipped without
[ -e /usr/include/libaio.h ] || wanted+=(libaio-dev)  # engine=zero3_nvme: tests/engine/test_nvme.py
command -v ip >/dev/null || wanted+=(iproute2)  # two hosts on one machine: tests/test_elastic.py
command -v chromium-headless-shell >/dev/null || wanted+=(chromium-headless-shell)  # tests/report
PATH=$PATH:/usr/sbin  # daemons of tests/launch: a Slurm of one host, and hosts that ssh reaches
command -v slurmd >/dev/null || wanted+=(slurm-wlm munge)
command -v sshd >/dev/null || wanted+=(openssh-server openssh-client)
command -v pdsh >/dev/null || wanted+=(pdsh)
if [ $((${#missing[@]} + ${#wanted[@]})) -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get -qq update
    for package in "${wanted[@]}"; do
        if apt-cache show "$package" >/dev/null 2>&1; then missing+=("$package"); fi
    done
    [ ${#missing[@]} = 0 ] || DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends "${missing[@]}"
fi
