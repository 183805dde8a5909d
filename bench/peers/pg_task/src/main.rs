//! pg_task as a user runs it: its macros, its worker, one pool per process.
//!
//!     bench-pg-task version
//!     bench-pg-task fill DSN TASKS WORKLOAD
//!     bench-pg-task drain DSN TASKS PROCS WORKLOAD
//!     bench-pg-task latency DSN PROCS PER_SECOND SECONDS
//!
//! `drain` starts PROCS processes of itself (`work`), each with a few of the crate's workers; when the table is
//! empty it sends the crate's own `stop_worker`. PG_TASK_WORKERS and PG_TASK_CONCURRENCY set the number of workers in a
//! process, and of steps that each may have under way.

use async_trait::async_trait;
use pg_task::{NextStep, Step, StepResult};
use serde::{Deserialize, Serialize};
use sqlx::{postgres::PgPoolOptions, PgPool};
use std::{
    env,
    error::Error,
    hash::{BuildHasher, RandomState},
    num::NonZeroUsize,
    path::Path,
    process::Stdio,
    str::FromStr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::{
    process::{Child, Command},
    time::sleep,
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Workers in a process, and steps under way in each: of 1 to 16 and 1 to 32 the fastest drain on two cores. Workers fetch
/// the next row one at a time, and more of them mostly hinder each other.
const WORKERS: usize = 1;
const CONCURRENCY: usize = 1;
const FILL_BATCH: usize = 10_000;
const POLL: Duration = Duration::from_millis(20);
const WARM_UP: i64 = 10;

macro_rules! numbered {
    ($($name:ident),*) => { $(
        #[derive(Debug, Deserialize, Serialize)]
        pub struct $name {
            pub number: i64,
        }
    )* };
}

numbered!(Nothing, First, Second, Third, Fourth, Fifth, Suspend, Spin, Write, Measure);

#[derive(Debug, Deserialize, Serialize)]
pub struct Carry {
    pub number: i64,
    pub text: String,
}

pg_task::task!(Noop { Nothing });
pg_task::task!(Chain5 {
    First,
    Second,
    Third,
    Fourth,
    Fifth
});
pg_task::task!(Sleep0 { Suspend });
pg_task::task!(Cpu1ms { Spin });
pg_task::task!(SqlWrite { Write });
pg_task::task!(Payload { Carry });
pg_task::task!(Probe { Measure });
pg_task::scheduler!(Tasks {
    Noop,
    Chain5,
    Sleep0,
    Cpu1ms,
    SqlWrite,
    Payload,
    Probe
});

macro_rules! ends {
    ($($name:ident of $task:ident),*) => { $(
        #[async_trait]
        impl Step<$task> for $name {
            async fn step(self, _db: &PgPool) -> StepResult<$task> {
                NextStep::none()
            }
        }
    )* };
}

macro_rules! goes_on {
    ($($name:ident => $next:ident),*) => { $(
        #[async_trait]
        impl Step<Chain5> for $name {
            async fn step(self, _db: &PgPool) -> StepResult<Chain5> {
                NextStep::now($next { number: self.number })
            }
        }
    )* };
}

ends!(Nothing of Noop, Carry of Payload, Fifth of Chain5);
goes_on!(First => Second, Second => Third, Third => Fourth, Fourth => Fifth);

#[async_trait]
impl Step<Sleep0> for Suspend {
    async fn step(self, _db: &PgPool) -> StepResult<Sleep0> {
        tokio::task::yield_now().await;
        NextStep::none()
    }
}

#[async_trait]
impl Step<Cpu1ms> for Spin {
    async fn step(self, _db: &PgPool) -> StepResult<Cpu1ms> {
        let until = Instant::now() + Duration::from_millis(1);
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        NextStep::none()
    }
}

#[async_trait]
impl Step<SqlWrite> for Write {
    async fn step(self, db: &PgPool) -> StepResult<SqlWrite> {
        sqlx::query("INSERT INTO bench_effects (number) VALUES ($1)")
            .bind(self.number)
            .execute(db)
            .await?;
        NextStep::none()
    }
}

#[async_trait]
impl Step<Probe> for Measure {
    async fn step(self, _db: &PgPool) -> StepResult<Probe> {
        println!("{} {}", self.number, now());
        NextStep::none()
    }
}

#[tokio::main]
async fn main() {
    if let Err(error) = run().await {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

async fn run() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["version"] => println!("pg_task {}", version()),
        ["fill", dsn, tasks, workload] => fill(dsn, tasks.parse()?, workload).await?,
        ["drain", dsn, _, procs, _] => drain(dsn, procs.parse()?).await?,
        ["latency", dsn, procs, per_second, seconds] => {
            latency(dsn, procs.parse()?, per_second.parse()?, seconds.parse()?).await?;
        }
        ["work", dsn, workers, concurrency] => {
            work(dsn, workers.parse()?, concurrency.parse()?).await?;
        }
        _ => return Err("usage: version | fill | drain | latency".into()),
    }
    Ok(())
}

/// Version in the name of the crate's directory at build time: .../pg_task-1.0.0/Cargo.toml
fn version() -> &'static str {
    let directory = env!("PG_TASK_MANIFEST").trim_end_matches("/Cargo.toml");
    directory.rsplit("/pg_task-").next().unwrap_or("?")
}

async fn migrate(db: &PgPool) -> Result<()> {
    let migrations = Path::new(env!("PG_TASK_MIGRATIONS"));
    sqlx::migrate::Migrator::new(migrations)
        .await?
        .run(db)
        .await?;
    Ok(())
}

fn task(workload: &str, number: i64) -> Result<Tasks> {
    Ok(match workload {
        "noop" => Tasks::Noop(Nothing { number }.into()),
        "chain5" => Tasks::Chain5(First { number }.into()),
        "sleep0" => Tasks::Sleep0(Suspend { number }.into()),
        "cpu1ms" => Tasks::Cpu1ms(Spin { number }.into()),
        "sqlwrite" => Tasks::SqlWrite(Write { number }.into()),
        "payload1k" => Tasks::Payload(
            Carry {
                number,
                text: text(1_000),
            }
            .into(),
        ),
        "payload100k" => Tasks::Payload(
            Carry {
                number,
                text: text(100_000),
            }
            .into(),
        ),
        _ => return Err(format!("unknown workload {workload}").into()),
    })
}

/// Letters that do not compress: base 64 of random bytes.
fn text(size: usize) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut left = String::with_capacity(size + 9);
    while left.len() < size {
        let mut bits = RandomState::new().hash_one(left.len());
        for _ in 0..10 {
            left.push(LETTERS[(bits & 63) as usize] as char);
            bits >>= 6;
        }
    }
    left.truncate(size);
    left
}

/// Insert rows as `enqueue` writes them, but many in a statement, since the bench measures the drain.
async fn fill(dsn: &str, tasks: i64, workload: &str) -> Result<()> {
    let db = PgPool::connect(dsn).await?;
    migrate(&db).await?;
    if workload == "sqlwrite" {
        sqlx::query("CREATE TABLE bench_effects (number bigint NOT NULL)")
            .execute(&db)
            .await?;
    }
    let size = if workload == "payload100k" {
        100
    } else {
        FILL_BATCH
    };
    let mut batch = Vec::with_capacity(size);
    for number in 0..tasks {
        batch.push(serde_json::to_string(&task(workload, number)?)?);
        if batch.len() == size || number == tasks - 1 {
            sqlx::query("INSERT INTO pg_task (step) SELECT unnest($1::text[])")
                .bind(&batch)
                .execute(&db)
                .await?;
            batch.clear();
        }
    }
    Ok(())
}

async fn drain(dsn: &str, procs: usize) -> Result<()> {
    let mut workers = start(dsn, procs, Stdio::inherit)?;
    let db = PgPoolOptions::new().max_connections(1).connect(dsn).await?;
    until_empty(&db, &mut workers).await?;
    stop(&db, workers).await
}

/// Poll the table. A query is cheap while there is work: it ends at the first row.
async fn until_empty(db: &PgPool, workers: &mut [Child]) -> Result<()> {
    loop {
        let some: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_task)")
            .fetch_one(db)
            .await?;
        if !some {
            return Ok(());
        }
        for worker in workers.iter_mut() {
            if let Some(status) = worker.try_wait()? {
                return Err(format!("a worker ended early: {status}").into());
            }
        }
        sleep(POLL).await;
    }
}

async fn stop(db: &PgPool, workers: Vec<Child>) -> Result<()> {
    sqlx::query("NOTIFY pg_task_changed, 'stop_worker'")
        .execute(db)
        .await?;
    for mut worker in workers {
        let status = worker.wait().await?;
        if !status.success() {
            return Err(format!("a worker ended with {status}").into());
        }
    }
    Ok(())
}

fn setting(name: &str, default: usize) -> String {
    env::var(name).unwrap_or_else(|_| default.to_string())
}

fn start(dsn: &str, procs: usize, output: fn() -> Stdio) -> Result<Vec<Child>> {
    let workers = setting("PG_TASK_WORKERS", WORKERS);
    let concurrency = setting("PG_TASK_CONCURRENCY", CONCURRENCY);
    (0..procs)
        .map(|_| {
            Command::new(env::current_exe()?)
                .args(["work", dsn, &workers, &concurrency])
                .stdout(output())
                .kill_on_drop(true)
                .spawn()
                .map_err(Into::into)
        })
        .collect()
}

/// One process: its workers share a pool, with a connection for each step under way, and those of the claims, the
/// heartbeats and the listeners.
async fn work(dsn: &str, workers: usize, concurrency: usize) -> Result<()> {
    let db = PgPoolOptions::new()
        .max_connections((workers * (concurrency + 3)) as u32)
        .connect(dsn)
        .await?;
    let concurrency = NonZeroUsize::new(concurrency).ok_or("concurrency must not be 0")?;
    let running: Vec<_> = (0..workers)
        .map(|_| {
            let worker = pg_task::Worker::<Tasks>::new(db.clone()).with_concurrency(concurrency);
            tokio::spawn(async move { worker.run().await })
        })
        .collect();
    for worker in running {
        worker.await??;
    }
    Ok(())
}

async fn latency(dsn: &str, procs: usize, per_second: f64, seconds: f64) -> Result<()> {
    let db = PgPoolOptions::new().max_connections(8).connect(dsn).await?;
    migrate(&db).await?;
    let mut workers = start(dsn, procs, Stdio::piped)?;
    sleep(Duration::from_secs(1)).await;
    for number in 0..WARM_UP {
        pg_task::enqueue(
            &db,
            &Tasks::Probe(
                Measure {
                    number: -1 - number,
                }
                .into(),
            ),
        )
        .await?;
        sleep(Duration::from_secs_f64(1.0 / per_second)).await;
    }
    let count = (per_second * seconds).round().max(1.0) as usize;
    let (mut called, mut enqueues) = (vec![0.0; count], vec![0.0; count]);
    let began = Instant::now();
    for number in 0..count {
        let at = Duration::from_secs_f64(number as f64 / per_second);
        sleep(at.saturating_sub(began.elapsed())).await;
        called[number] = now();
        pg_task::enqueue(
            &db,
            &Tasks::Probe(
                Measure {
                    number: number as i64,
                }
                .into(),
            ),
        )
        .await?;
        enqueues[number] = 1000.0 * (now() - called[number]);
    }
    until_empty(&db, &mut workers).await?;
    sqlx::query("NOTIFY pg_task_changed, 'stop_worker'")
        .execute(&db)
        .await?;
    let mut starts = vec![];
    for worker in workers {
        let output = worker.wait_with_output().await?;
        for line in String::from_utf8(output.stdout)?.lines() {
            let (number, at) = line.split_once(' ').ok_or("a line of a worker")?;
            if let Ok(number) = usize::from_str(number) {
                starts.push(1000.0 * (f64::from_str(at)? - called[number]));
            }
        }
    }
    if starts.len() != count {
        return Err(format!("{} of {count} tasks were started", starts.len()).into());
    }
    println!(
        "{{\"start_p50\":{},\"start_p99\":{},\"enqueue_p50\":{},\"enqueue_p99\":{},\"samples\":{count}}}",
        percentile(&mut starts, 50),
        percentile(&mut starts, 99),
        percentile(&mut enqueues, 50),
        percentile(&mut enqueues, 99),
    );
    Ok(())
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

fn percentile(numbers: &mut [f64], percent: usize) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[(numbers.len() * percent).div_ceil(100).max(1) - 1]
}
