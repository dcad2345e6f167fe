//! The run: one fault after the other, what was heard meanwhile, and whether that was right.

use rustix::process::Pid;

use super::catalogue::Fault;
use super::page::{self, Row};
use super::site::{Site, Times};
use crate::truth::fleet::REPLICAS;
use crate::truth::history::{Figures, History, Micros, Outcome, Probe, Violation};

/// Resident memory of a sidecar at any time, in KiB: a debug build with all of these keys.
const MOST_RESIDENT: u64 = 200 << 10;
/// Of pairs at random, where `make faults` is asked for them.
const SEED: &str = "KEYWARD_FAULTS_SEED";
const PAIRS: usize = 6;

/// What is to be run: a list of faults at a time.
fn wanted() -> Vec<Vec<Fault>> {
    let said = std::env::var("KEYWARD_FAULTS").unwrap_or_default();
    let mut wanted: Vec<Vec<Fault>> = match &*said {
        "" => Fault::SHORT.map(|fault| vec![fault]).into(),
        "all" => Fault::ALL.map(|fault| vec![fault]).into(),
        numbers => {
            let numbers: Vec<&str> = numbers.split([',', ' ']).filter(|number| !number.is_empty()).collect();
            let known = |number: &&str| Fault::ALL.iter().any(|fault| fault.case().number == *number);
            let unknown: Vec<&&str> = numbers.iter().filter(|number| !known(number)).collect();
            assert!(unknown.is_empty(), "there is no fault {unknown:?} here; docs/reliability.md lists them");
            let chosen = Fault::ALL.into_iter().filter(|fault| numbers.contains(&fault.case().number));
            chosen.map(|fault| vec![fault]).collect()
        }
    };
    if let Ok(seed) = std::env::var(SEED) {
        wanted.extend(pairs(seed.parse().expect("a seed is a number")));
    }
    wanted
}

/// Pairs of faults that can be there at the same time, the same for the same seed.
fn pairs(seed: u64) -> Vec<Vec<Fault>> {
    let mut state = seed;
    let mut random = |below: usize| {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % u64::try_from(below).unwrap()).unwrap()
    };
    let redis = &Fault::ALL[..17];
    let others = &Fault::ALL[17..];
    (0..PAIRS).map(|_| vec![redis[random(redis.len())], others[random(others.len())]]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_breaks_nobody_gets_in_and_nobody_is_thrown_out() {
    let wanted = wanted();
    let mut site = Site::start().await;
    let mut done: Vec<(Vec<Fault>, Times)> = Vec::new();
    let mut unfelt: Vec<Fault> = Vec::new();
    for faults in wanted {
        let names: Vec<_> = faults.iter().map(|fault| fault.case().what).collect();
        println!("{:>6} s  {}", site.fleet.clock.now() / 1_000_000, names.join("; and "));
        let before = traces(&site, &faults).await;
        let times = site.go_through(&faults).await;
        for (fault, (before, after)) in faults.iter().zip(before.iter().zip(traces(&site, &faults).await)) {
            let has_risen = before.iter().zip(&after).any(|(before, after)| after > before);
            if fault.trace().is_some() && !has_risen {
                unfelt.push(*fault);
            }
        }
        done.push((faults, times));
        assert_alive(&site);
    }
    let steady = site.steady_keys();
    let history = site.history().await;
    let verdict = history.judge();
    let rows: Vec<Row> = done
        .iter()
        .map(|(faults, times)| row(faults, times, &site, &history, &steady, &verdict.violations))
        .collect();
    println!("{}", page::table(&rows));
    page::write_if_asked(&rows);

    let said: Vec<String> = verdict.violations.iter().take(20).map(ToString::to_string).collect();
    assert!(said.is_empty(), "{} answers were wrong:\n{}", verdict.violations.len(), said.join("\n"));
    assert!(unfelt.is_empty(), "no sidecar has met {unfelt:?}");
    let (asked, allowed) = site.load.junk();
    assert!(asked > 0 && allowed == 0, "{allowed} of {asked} keys that do not exist were allowed");
    assert!(site.load.cold().len() > done.len() * 10, "hardly any new key was asked for");
    for row in &rows {
        assert!(row.known.is_some(), "{}: nothing was measured", row.what);
        if !row.may_be_unavailable {
            assert_eq!(row.unavailable, 0, "{}: known keys were not answered", row.what);
        }
        assert!(row.recovered, "{}: not everything was well again at the end", row.what);
    }
}

/// What each sidecar has counted of each fault so far; nothing where a fault is not counted.
async fn traces(site: &Site, faults: &[Fault]) -> Vec<Vec<f64>> {
    let mut traces = Vec::new();
    for fault in faults {
        let mut counts = Vec::new();
        if let Some((name, labels)) = fault.trace() {
            for replica in &site.fleet.replicas {
                counts.push(replica.keyward.metric(name, labels).await);
            }
        }
        traces.push(counts);
    }
    traces
}

/// No sidecar has ended or panicked, or takes more memory than it may.
fn assert_alive(site: &Site) {
    for replica in &site.fleet.replicas {
        let (keyward, log) = (&replica.keyward, replica.keyward.log());
        assert!(!log.contains("panicked"), "{log}");
        let pid = keyward.id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        let status = status.unwrap_or_else(|error| panic!("keyward has ended: {error}\n{log}"));
        let resident =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it is not a zombie");
        let resident: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(resident < MOST_RESIDENT, "keyward takes {resident} KiB");
        assert!(i32::try_from(pid).ok().and_then(Pid::from_raw).is_some());
    }
}

fn row(
    faults: &[Fault],
    times: &Times,
    site: &Site,
    history: &History,
    steady: &[usize],
    violations: &[Violation],
) -> Row {
    let cases: Vec<_> = faults.iter().map(|fault| fault.case()).collect();
    let within = |probe: &&Probe, from: Micros, to: Micros| (from..to).contains(&probe.start);
    let is_steady = |probe: &&Probe| steady.contains(&probe.key);
    let of = |from, to| history.probes.iter().filter(move |probe| within(probe, from, to));
    let took = |from, to| {
        let allowed = of(from, to).filter(is_steady).filter(|probe| probe.outcome == Outcome::Allow);
        Figures::of(allowed.map(|probe| probe.end - probe.start).collect())
    };
    let failed = |probe: &&Probe| matches!(probe.outcome, Outcome::Unavailable | Outcome::Other);
    let cold = |probe: &&Probe| probe.key >= 1_000_000;
    let calls = site.load.calls();
    let failed_calls = |from: Micros, to: Micros| {
        calls
            .iter()
            .filter(|call| (from..to).contains(&call.start) && call.status != Some(200))
            .collect::<Vec<_>>()
    };
    // What was sent while the fault was there and heard of after it counts as the fault's.
    let late_probes =
        of(times.healed, times.after).filter(failed).filter(|probe| is_steady(probe) || cold(probe));
    let late = late_probes.map(|probe| probe.end);
    let late = late.chain(failed_calls(times.healed, times.after).iter().map(|call| call.end)).max();
    let recovery = late.unwrap_or(times.healed) - times.healed;
    Row {
        numbers: cases.iter().map(|case| case.number).collect::<Vec<_>>().join(" and "),
        what: cases.iter().map(|case| case.what).collect::<Vec<_>>().join("; "),
        may_be_unavailable: cases.iter().any(|case| case.may_be_unavailable),
        before: took(times.before, times.broken),
        known: took(times.broken, times.healed).or_else(|| took(times.healed, times.after)),
        checks: of(times.broken, times.after).count(),
        unavailable: of(times.broken, times.healed).filter(is_steady).filter(failed).count(),
        cold_unavailable: of(times.broken, times.healed).filter(cold).filter(failed).count(),
        cold: of(times.broken, times.healed).filter(cold).count(),
        failed_calls: failed_calls(times.broken, times.healed).len(),
        calls: calls.iter().filter(|call| (times.broken..times.healed).contains(&call.start)).count(),
        wrong: violations
            .iter()
            .filter(|violation| (times.broken..times.after).contains(&violation.probe.start))
            .count(),
        recovery,
        recovered: times.after.saturating_sub(times.healed + recovery) > 500_000,
    }
}

impl Site {
    pub(super) async fn cause(&mut self, fault: Fault) {
        match family(fault) {
            Family::Redis => self.harm_redis(fault).await,
            Family::Postgres => self.harm_postgres(fault).await,
            Family::Machine => self.harm_machine(fault).await,
            Family::Both => {
                self.harm_redis(Fault::RedisKilled).await;
                self.harm_postgres(Fault::PostgresKilled).await;
            }
        }
    }

    pub(super) async fn end(&mut self, fault: Fault) {
        self.held.tasks.shutdown().await;
        self.held.sessions.clear();
        self.held.connections.clear();
        self.held.processes.clear();
        match family(fault) {
            Family::Redis => self.heal_redis(fault).await,
            Family::Postgres => self.heal_postgres(fault).await,
            Family::Machine => self.heal_machine(fault),
            Family::Both => {
                self.heal_postgres(Fault::PostgresKilled).await;
                self.heal_redis(Fault::RedisKilled).await;
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Family {
    Redis,
    Postgres,
    Machine,
    Both,
}

fn family(fault: Fault) -> Family {
    let place = Fault::ALL.iter().position(|other| *other == fault).unwrap();
    let first_of = |fault: Fault| Fault::ALL.iter().position(|other| *other == fault).unwrap();
    match fault {
        Fault::BothGone => Family::Both,
        Fault::OneCutOff => Family::Postgres,
        _ if place < first_of(Fault::PostgresKilled) => Family::Redis,
        _ if place < first_of(Fault::SidecarKilled) => Family::Postgres,
        _ => Family::Machine,
    }
}

#[test]
fn the_same_seed_makes_the_same_pairs() {
    assert_eq!(pairs(7), pairs(7));
    assert_ne!(pairs(7), pairs(8));
    assert_eq!(REPLICAS, 3, "the page says three");
}
