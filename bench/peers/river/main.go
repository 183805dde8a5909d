// River under the bench: fill its queue, drain it with N processes, measure its latency.
//
// Settings: those of River's own `river bench`, which finds them much better than the defaults: 2,000 workers, a
// cooldown of 2 ms, a poll of 20 ms. Jobs are inserted with InsertManyFast (COPY); completion is batched by default.
package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
	"golang.org/x/sync/errgroup"
)

// warmUp is the number of first jobs that do not count, since they are slow while all is cold.
const warmUp = 10

var sizes = map[string]int{"payload1k": 1_000, "payload100k": 100_000}

// Args of a job: its number, and a body in the workloads that have one.
type Args struct {
	Number int    `json:"number"`
	Body   string `json:"body,omitempty"`
}

// Kind is the name of the job.
func (Args) Kind() string { return "work" }

// Work is the worker of the jobs.
type Work struct {
	river.WorkerDefaults[Args]
	do func(number int)
}

// Work runs one job.
func (w *Work) Work(_ context.Context, job *river.Job[Args]) error {
	w.do(job.Args.Number)
	return nil
}

// fill creates its schema and `tasks` jobs, in batches of about 10 MB at most.
func fill(ctx context.Context, dsn string, tasks int, workload string) error {
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		return err
	}
	defer pool.Close()
	driver := riverpgxv5.New(pool)
	migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Logger: quiet()})
	if err != nil {
		return err
	}
	if _, err = migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return err
	}
	client, err := river.NewClient(driver, &river.Config{Logger: quiet()})
	if err != nil {
		return err
	}
	size := sizes[workload]
	batch := min(10_000, 10_000_000/max(size, 1))
	for begin := 0; begin < tasks; begin += batch {
		var jobs []river.InsertManyParams
		for number := begin; number < min(begin+batch, tasks); number++ {
			jobs = append(jobs, river.InsertManyParams{Args: Args{Number: number, Body: body(size)}})
		}
		if _, err = client.InsertManyFast(ctx, jobs); err != nil {
			return err
		}
	}
	return nil
}

// body is `size` bytes that do not compress.
func body(size int) string {
	raw := make([]byte, size*3/4)
	rand.Read(raw)
	return base64.StdEncoding.EncodeToString(raw)
}

func quiet() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// work is one worker process, until SIGTERM; it tells its parent how many jobs are done, or when each started.
func work(ctx context.Context, dsn, workload string) error {
	var done atomic.Int64
	do := func(int) { done.Add(1) }
	switch workload {
	case "sleep0":
		do = func(int) { runtime.Gosched(); done.Add(1) }
	case "cpu1ms":
		do = func(int) {
			for begun := time.Now(); time.Since(begun) < time.Millisecond; {
			}
			done.Add(1)
		}
	case "probe":
		do = func(number int) { fmt.Printf("%d %d\n", number, time.Now().UnixMicro()) }
	}
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		return err
	}
	defer pool.Close()
	workers := river.NewWorkers()
	river.AddWorker(workers, &Work{do: do})
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{
		FetchCooldown:     2 * time.Millisecond,
		FetchPollInterval: 20 * time.Millisecond,
		Logger:            quiet(),
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 2_000}},
		Workers:           workers,
	})
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	if err = client.Start(ctx); err != nil {
		return err
	}
	ticker := time.NewTicker(5 * time.Millisecond)
	told := int64(0)
	for {
		select {
		case <-stop:
			return client.Stop(ctx)
		case <-ticker.C:
			if now := done.Load(); now != told {
				told = now
				fmt.Println(now)
			}
		}
	}
}

// workerLine is a line of output of a worker.
type workerLine struct {
	worker int
	line   string
}

// start runs `procs` workers; their output comes over the channel, which is closed when all have exited.
func start(dsn string, procs int, workload string) ([]*exec.Cmd, <-chan workerLine, error) {
	lines := make(chan workerLine, 1024)
	var open atomic.Int64
	open.Store(int64(procs))
	var fleet []*exec.Cmd
	for worker := range procs {
		child := exec.Command(os.Args[0], "work", dsn, workload)
		child.Stderr = os.Stderr
		pipe, err := child.StdoutPipe()
		if err != nil {
			return nil, nil, err
		}
		if err = child.Start(); err != nil {
			return nil, nil, err
		}
		fleet = append(fleet, child)
		go func() {
			for scanner := bufio.NewScanner(pipe); scanner.Scan(); {
				lines <- workerLine{worker, scanner.Text()}
			}
			if open.Add(-1) == 0 {
				close(lines)
			}
		}()
	}
	return fleet, lines, nil
}

// stop lets all workers finish their jobs and exit.
func stop(fleet []*exec.Cmd, lines <-chan workerLine) error {
	for _, child := range fleet {
		child.Process.Signal(syscall.SIGTERM)
	}
	for range lines {
	}
	var failed error
	for _, child := range fleet {
		failed = errors.Join(failed, child.Wait())
	}
	return failed
}

// drain runs `procs` workers until `tasks` jobs are done.
func drain(dsn string, tasks, procs int, workload string) error {
	fleet, lines, err := start(dsn, procs, workload)
	if err != nil {
		return err
	}
	counts := make([]int, procs)
	total := 0
	for told := range lines {
		count, _ := strconv.Atoi(told.line)
		total += count - counts[told.worker]
		counts[told.worker] = count
		if total >= tasks {
			return stop(fleet, lines)
		}
	}
	return errors.Join(errors.New("the workers ended before the work was done"), stop(fleet, lines))
}

// latency enqueues one by one at fixed times, and times the start of each.
func latency(ctx context.Context, dsn string, procs int, perSecond, seconds float64) error {
	if err := fill(ctx, dsn, 0, "noop"); err != nil {
		return err
	}
	fleet, lines, err := start(dsn, procs, "probe")
	if err != nil {
		return err
	}
	starts := map[int]int64{}
	heard := make(chan struct{})
	go func() {
		for told := range lines {
			var number int
			var at int64
			if _, err := fmt.Sscan(told.line, &number, &at); err == nil {
				starts[number] = at
			}
		}
		close(heard)
	}()
	time.Sleep(2 * time.Second)
	begins, ends, err := produce(ctx, dsn, warmUp+int(perSecond*seconds), perSecond)
	time.Sleep(time.Second)
	if err = errors.Join(err, stop(fleet, lines)); err != nil {
		return err
	}
	<-heard
	var waits, takes []float64
	for number, begun := range begins {
		if number < warmUp {
			continue
		}
		takes = append(takes, float64(ends[number]-begun)/1e3)
		if at, ok := starts[number]; ok {
			waits = append(waits, float64(at-begun)/1e3)
		}
	}
	slices.Sort(waits)
	slices.Sort(takes)
	at := func(values []float64, percent int) float64 { return values[(len(values)-1)*percent/100] }
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"start_p50": at(waits, 50), "start_p99": at(waits, 99),
		"enqueue_p50": at(takes, 50), "enqueue_p99": at(takes, 99),
		"samples": len(waits),
	})
}

// produce returns the begin and the end of each call of Insert, in microseconds.
func produce(ctx context.Context, dsn string, count int, perSecond float64) (begins, ends []int64, err error) {
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		return nil, nil, err
	}
	defer pool.Close()
	client, err := river.NewClient[pgx.Tx](riverpgxv5.New(pool), &river.Config{Logger: quiet()})
	if err != nil {
		return nil, nil, err
	}
	begins, ends = make([]int64, count), make([]int64, count)
	calls, ctx := errgroup.WithContext(ctx)
	first := time.Now()
	for number := range count {
		time.Sleep(time.Until(first.Add(time.Duration(float64(number) / perSecond * float64(time.Second)))))
		calls.Go(func() error {
			begins[number] = time.Now().UnixMicro()
			_, err := client.Insert(ctx, Args{Number: number}, nil)
			ends[number] = time.Now().UnixMicro()
			return err
		})
	}
	return begins, ends, calls.Wait()
}

// version returns the version of River in this build.
func version() {
	info, _ := debug.ReadBuildInfo()
	for _, module := range info.Deps {
		if module.Path == "github.com/riverqueue/river" {
			fmt.Println(module.Version)
		}
	}
}

func main() {
	number := func(at int) int {
		value, err := strconv.Atoi(os.Args[at])
		if err != nil {
			panic(err)
		}
		return value
	}
	real := func(at int) float64 {
		value, err := strconv.ParseFloat(os.Args[at], 64)
		if err != nil {
			panic(err)
		}
		return value
	}
	ctx := context.Background()
	var err error
	switch os.Args[1] {
	case "version":
		version()
	case "fill":
		err = fill(ctx, os.Args[2], number(3), os.Args[4])
	case "drain":
		err = drain(os.Args[2], number(3), number(4), os.Args[5])
	case "work":
		err = work(ctx, os.Args[2], os.Args[3])
	case "latency":
		err = latency(ctx, os.Args[2], number(3), real(4), real(5))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
