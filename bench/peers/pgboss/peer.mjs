/* pg-boss under the bench: fill its queue, drain it with N processes, measure its latency.
 *
 * Settings, all from its pages on workers and queues: one handler for a batch (the completion of a batch is one
 * statement), `burstWhenBatchFull` so that no timer stands between full batches, a partition of its own for a large
 * queue, LISTEN/NOTIFY for an idle one.
 */

import { fork } from "node:child_process";
import { randomBytes } from "node:crypto";
import { setImmediate as turn, setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { PgBoss } from "pg-boss";

const QUEUE = "work";
const BATCH = 1000;
const WARM_UP = 10;
const SIZES = { payload1k: 1_000, payload100k: 100_000 };
const OPTIONS = {
  batchSize: BATCH,
  burstWhenBatchFull: true,
  pollingIntervalSeconds: 0.5,
  notifyPollingIntervalSeconds: 0.5,
};

const now = () => performance.timeOrigin + performance.now();

/** Open a client. One that only sends does no upkeep and does not listen. */
async function open(dsn, worker) {
  const boss = new PgBoss({
    connectionString: dsn,
    max: 4,
    schedule: false,
    supervise: worker,
    useListenNotify: worker,
  });
  boss.on("error", (error) => console.error(error));
  return await boss.start();
}

/** Create its schema and `tasks` jobs, in batches of about 10 MB at most. */
async function fill(dsn, tasks, workload) {
  const boss = await open(dsn, false);
  await boss.createQueue(QUEUE, { partition: true, notify: true });
  const size = SIZES[workload] ?? 0;
  const batch = Math.min(10_000, Math.floor(10_000_000 / Math.max(size, 1)));
  for (let begin = 0; begin < tasks; begin += batch) {
    const jobs = [];
    for (let number = begin; number < Math.min(begin + batch, tasks); number++) {
      jobs.push({ data: size ? { number, body: randomBytes((size * 3) / 4).toString("base64") } : { number } });
    }
    await boss.insert(QUEUE, jobs);
  }
  await boss.stop({ graceful: false });
}

const HANDLERS = {
  noop: async (_job) => {},
  sleep0: async (_job) => await turn(),
  cpu1ms: async (_job) => {
    const until = performance.now() + 1;
    while (performance.now() < until);
  },
};

/** Run one worker process, which tells its parent how many jobs of a batch are done, or when each started. */
async function work(dsn, workload) {
  const boss = await open(dsn, true);
  const handler = HANDLERS[workload] ?? HANDLERS.noop;
  await boss.work(QUEUE, OPTIONS, async (jobs) => {
    if (workload === "probe") {
      const at = now();
      process.send(jobs.map((job) => [job.data.number, at]));
    } else {
      await Promise.all(jobs.map(handler));
      process.send(jobs.length);
    }
  });
  process.on("SIGTERM", async () => {
    await boss.stop({ graceful: true, timeout: 10_000 });
    process.disconnect();
  });
  process.send("ready");
}

/** Start `procs` workers; `receive` is called with each message but that they are ready. */
async function start(dsn, procs, workload, receive) {
  const file = fileURLToPath(import.meta.url);
  const fleet = Array.from({ length: procs }, () => fork(file, ["work", dsn, workload]));
  const readies = fleet.map(
    (child) =>
      new Promise((resolve) => {
        child.on("message", (message) => (message === "ready" ? resolve() : receive(message)));
        child.on("exit", (code) => {
          if (code) {
            console.error(`a worker ended with ${code}`);
            process.exit(1);
          }
        });
      }),
  );
  return { fleet, ready: Promise.all(readies) };
}

/** Let all workers finish their jobs and exit. */
async function stop(fleet) {
  const ends = fleet.map((child) => new Promise((resolve) => child.on("exit", resolve)));
  for (const child of fleet) child.kill("SIGTERM");
  await Promise.all(ends);
}

/** Run `procs` workers until `tasks` jobs are done. */
async function drain(dsn, tasks, procs, workload) {
  let done = 0;
  let finish;
  const finished = new Promise((resolve) => (finish = resolve));
  const { fleet } = await start(dsn, procs, workload, (count) => {
    done += count;
    if (done >= tasks) finish();
  });
  await finished;
  await stop(fleet);
}

/** Enqueue one by one at fixed times, and time the start of each. */
async function latency(dsn, procs, perSecond, seconds) {
  await fill(dsn, 0, "noop");
  const starts = new Map();
  const { fleet, ready } = await start(dsn, procs, "probe", (seen) => {
    for (const [number, at] of seen) starts.set(number, at);
  });
  await ready;
  await sleep(2000);
  const boss = await open(dsn, false);
  const calls = [];
  const sends = [];
  const first = now();
  for (let number = 0; number < WARM_UP + perSecond * seconds; number++) {
    await sleep(Math.max(0, first + (number * 1000) / perSecond - now()));
    const began = now();
    sends.push(boss.send(QUEUE, { number }).then(() => (calls[number] = [began, now()])));
  }
  await Promise.all(sends);
  await sleep(1000);
  await boss.stop({ graceful: false });
  await stop(fleet);
  const warm = calls.map(([began, ended], number) => [began, ended, starts.get(number)]).slice(WARM_UP);
  const started = warm.flatMap(([began, , begun]) => (begun === undefined ? [] : [begun - began]));
  const took = warm.map(([began, ended]) => ended - began);
  const at = (values, share) => values.sort((a, b) => a - b)[Math.floor((values.length - 1) * share)];
  console.log(
    JSON.stringify({
      start_p50: at(started, 0.5),
      start_p99: at(started, 0.99),
      enqueue_p50: at(took, 0.5),
      enqueue_p99: at(took, 0.99),
      samples: started.length,
    }),
  );
}

const [command, dsn, ...rest] = process.argv.slice(2);
const commands = {
  fill: () => fill(dsn, +rest[0], rest[1]),
  drain: () => drain(dsn, +rest[0], +rest[1], rest[2]),
  work: () => work(dsn, rest[0]),
  latency: () => latency(dsn, +rest[0], +rest[1], +rest[2]),
};
await commands[command]();
