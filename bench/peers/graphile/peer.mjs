// Graphile Worker, set up for throughput as its documentation advises, in any number of processes.
//
//     node peer.mjs version
//     node peer.mjs fill DSN TASKS WORKLOAD
//     node peer.mjs drain DSN TASKS PROCS WORKLOAD
//     node peer.mjs latency DSN PROCS PER_SECOND SECONDS
//
// The processes tell the parent how many tasks they have finished, so that no query disturbs the database meanwhile.

import { fork } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { createRequire } from "node:module";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { Logger, makeWorkerUtils, run } from "graphile-worker";

const REPORT_MS = 10;
const WARM_UP = 10;
const CHAIN = 5;
const logger = new Logger(() => (level, message) => {
  if (level === "error" || level === "warning") console.error(message);
});

// The preset that the performance page of its documentation measures.
const preset = (dsn) => ({
  worker: {
    connectionString: dsn,
    concurrentJobs: 24,
    maxPoolSize: 25,
    localQueue: { size: 500 },
    completeJobBatchDelay: 0,
    failJobBatchDelay: 0,
    logger,
  },
});

const now = () => performance.timeOrigin + performance.now(); // milliseconds since the epoch

let finished = 0;
const starts = [];
const taskList = {
  noop: () => {
    finished++;
  },
  chain5: async ({ number, place }, helpers) => {
    if (place < CHAIN) await helpers.addJob("chain5", { number, place: place + 1 });
    else finished++;
  },
  sleep0: async () => {
    await new Promise(setImmediate);
    finished++;
  },
  cpu1ms: () => {
    const until = performance.now() + 1;
    while (performance.now() < until);
    finished++;
  },
  sqlwrite: async ({ number }, helpers) => {
    await helpers.query("INSERT INTO bench_effects (number) VALUES ($1)", [number]);
    finished++;
  },
  measure: ({ number }) => {
    starts.push([number, now()]);
    finished++;
  },
};
taskList.payload1k = taskList.payload100k = taskList.noop;

// Letters that cannot be compressed.
const text = (size) => randomBytes((size * 3) / 4).toString("base64");

function payload(workload, number) {
  if (workload === "chain5") return { number, place: 1 };
  if (workload === "payload1k") return { number, text: text(1_000) };
  if (workload === "payload100k") return { number, text: text(100_000) };
  return { number };
}

async function fill(dsn, tasks, workload) {
  const utils = await makeWorkerUtils({ preset: preset(dsn) });
  await utils.migrate();
  if (workload === "sqlwrite") {
    await utils.withPgClient((client) => client.query("CREATE TABLE bench_effects (number bigint NOT NULL)"));
  }
  const size = workload === "payload100k" ? 100 : 10_000;
  for (let first = 0; first < tasks; first += size) {
    const numbers = Array.from({ length: Math.min(size, tasks - first) }, (_, place) => first + place);
    await utils.addJobs(numbers.map((number) => ({ identifier: workload, payload: payload(workload, number) })));
  }
  await utils.release();
}

// One worker process. It sends its parent the count of its finished tasks, and at its end the start of each measured one.
async function work(dsn) {
  const runner = await run({ preset: preset(dsn), taskList, noHandleSignals: true });
  let sent = 0;
  const timer = setInterval(() => {
    if (finished > sent) process.send({ finished: (sent = finished) });
  }, REPORT_MS);
  process.send({ ready: true });
  await once(process, "message");
  clearInterval(timer);
  await runner.stop();
  await new Promise((sent) => process.send({ starts }, sent));
  process.disconnect();
}

function startWorkers(dsn, procs) {
  const progress = new Array(procs).fill(0);
  const found = [];
  const children = progress.map((_, place) => {
    const child = fork(fileURLToPath(import.meta.url), ["work", dsn]);
    child.isReady = new Promise((ready) => {
      child.on("message", (message) => {
        if (message.ready) ready();
        if (message.finished) progress[place] = message.finished;
        if (message.starts) found.push(...message.starts);
      });
    });
    child.hasEnded = once(child, "exit").then(([code]) => {
      if (code !== 0) {
        console.error(`a worker ended with ${code}`);
        process.exit(1);
      }
    });
    return child;
  });
  return {
    ready: () => Promise.all(children.map((child) => child.isReady)),
    async until(tasks) {
      while (progress.reduce((sum, number) => sum + number) < tasks) await sleep(5);
    },
    async stop() {
      for (const child of children) child.send("stop");
      await Promise.all(children.map((child) => child.hasEnded));
      return new Map(found);
    },
  };
}

async function drain(dsn, tasks, procs) {
  const workers = startWorkers(dsn, procs);
  await workers.until(tasks);
  await workers.stop();
}

async function latency(dsn, procs, perSecond, seconds) {
  const utils = await makeWorkerUtils({ preset: preset(dsn) });
  await utils.migrate();
  const workers = startWorkers(dsn, procs);
  await workers.ready();
  await sleep(1000);
  for (let number = 0; number < WARM_UP; number++) {
    await utils.addJob("measure", { number: -1 - number });
    await sleep(1000 / perSecond);
  }
  const count = Math.max(1, Math.round(perSecond * seconds));
  const called = [];
  const enqueues = [];
  const began = now();
  for (let number = 0; number < count; number++) {
    const early = began + (1000 * number) / perSecond - now();
    if (early > 0) await sleep(early);
    called.push(now());
    await utils.addJob("measure", { number });
    enqueues.push(now() - called[number]);
  }
  await workers.until(count + WARM_UP);
  const found = await workers.stop();
  await utils.release();
  const waits = called.map((at, number) => found.get(number) - at);
  const of = (numbers, percent) =>
    numbers.sort((a, b) => a - b)[Math.max(1, Math.ceil((numbers.length * percent) / 100)) - 1];
  console.log(
    JSON.stringify({
      start_p50: of(waits, 50),
      start_p99: of(waits, 99),
      enqueue_p50: of(enqueues, 50),
      enqueue_p99: of(enqueues, 99),
      samples: count,
    }),
  );
}

const [verb, dsn, ...rest] = process.argv.slice(2);
if (verb === "version") {
  const version = (name) => createRequire(import.meta.url)(`./node_modules/${name}/package.json`).version;
  console.log(`graphile-worker ${version("graphile-worker")}, node ${process.versions.node}`);
} else if (verb === "fill") await fill(dsn, Number(rest[0]), rest[1]);
else if (verb === "drain") await drain(dsn, Number(rest[0]), Number(rest[1]));
else if (verb === "latency") await latency(dsn, Number(rest[0]), Number(rest[1]), Number(rest[2]));
else if (verb === "work") await work(dsn);
else throw new Error(`unknown: ${verb}`);
