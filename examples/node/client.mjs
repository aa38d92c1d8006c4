// A client of lp-serve: registers a portrait, lets it follow a motion or a folder of pictures, writes the results as JPEG files.
//
//   node client.mjs --portrait face.jpg --motion --out results
//
// It reads the .proto files themselves; nothing is generated. docs/protocol.md says what the messages mean.

import { once } from 'node:events';
import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { dirname, extname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';

const USAGE = `usage: node client.mjs --portrait FILE (--motion | --frames DIR) --out DIR [options]

  --portrait FILE    JPEG, PNG or WebP with a face
  --portrait-id ID   instead: a portrait that the server has already
  --motion           drive it with a made motion: a nod, a look around, blinks
  --frames DIR       drive it with the pictures of a folder, sorted by name
  --out DIR          where 000001.jpg, 000002.jpg, ... are written

  --target ADDRESS   of the server (127.0.0.1:50051); unix:/path too
  --token-env NAME   environment variable that holds the token
  --ca FILE          PEM certificates that the server's one is signed with; turns TLS on
  --mode MODE        live or lossless (--motion: live, --frames: lossless)
  --fps N            frames sent in a second (25); lossless: only the timestamps
  --count N          frames of --motion (75)
  --deadline SECONDS of the whole stream (none)
  --proto DIR        folder with lp_edge/v1/*.proto (that of the repository)`;

const IMAGES = new Set(['.jpg', '.jpeg', '.png', '.webp']);
const MAX_MESSAGE = 64 * 1024 * 1024; // gRPC's default is 4 MiB
const UNARY_SECONDS = 30;

class UsageError extends Error {}

// -- arguments ----------------------------------------------------------------------------------------------

function readArguments(argv) {
  const text = { type: 'string' };
  const options = {
    portrait: text, 'portrait-id': text, frames: text, out: text, target: { ...text, default: '127.0.0.1:50051' }, 'token-env': text, ca: text, mode: text,
    fps: { ...text, default: '25' }, count: { ...text, default: '75' }, deadline: text, proto: text,
    motion: { type: 'boolean', default: false }, help: { type: 'boolean', short: 'h', default: false },
  };
  let values;
  try {
    ({ values } = parseArgs({ args: argv, options }));
  } catch (error) {
    throw new UsageError(error.message);
  }
  if (values.help) return values;
  if (!values.out) throw new UsageError('--out is needed');
  if (Boolean(values.portrait) === Boolean(values['portrait-id'])) throw new UsageError('one of --portrait and --portrait-id is needed');
  if (values.motion === Boolean(values.frames)) throw new UsageError('one of --motion and --frames is needed');
  const number = (name, low, high) => {
    const value = Number(values[name]);
    if (!(value >= low && value <= high)) throw new UsageError(`--${name} ${values[name]}: expected ${low} to ${high}`);
    return value;
  };
  const mode = values.mode ?? (values.motion ? 'live' : 'lossless');
  if (!['live', 'lossless'].includes(mode)) throw new UsageError(`--mode ${mode}: expected live or lossless`);
  let token;
  if (values['token-env']) {
    token = process.env[values['token-env']];
    if (!token) throw new UsageError(`the environment variable ${values['token-env']} is not set`);
    const local = /^(unix:|localhost:|127\.|\[::1\]:)/.test(values.target);
    if (!values.ca && !local) throw new UsageError('a token for another machine needs TLS: give --ca');
  }
  return {
    ...values, mode, token, fps: number('fps', 0.1, 1000), count: Math.round(number('count', 1, 1e6)),
    deadline: values.deadline === undefined ? undefined : number('deadline', 0.001, 1e6),
    proto: values.proto ?? join(dirname(fileURLToPath(import.meta.url)), '..', '..', 'proto'),
  };
}

// -- connection ---------------------------------------------------------------------------------------------

/** Clients of the three services, with the token in every call. */
class Connection {
  constructor(options, ca) {
    const files = ['animation', 'portraits', 'server'].map((name) => `lp_edge/v1/${name}.proto`);
    // 64-bit numbers as JavaScript's: sequences and microseconds stay far below 2^53.
    this.types = loader.loadSync(files, { includeDirs: [options.proto], longs: Number, enums: String, defaults: true, oneofs: true });
    const { v1 } = grpc.loadPackageDefinition(this.types).lp_edge;
    const credentials = ca ? grpc.credentials.createSsl(ca) : grpc.credentials.createInsecure();
    const channel = {
      'grpc.max_receive_message_length': MAX_MESSAGE,
      'grpc.keepalive_time_ms': 20_000,
      'grpc.keepalive_timeout_ms': 10_000,
    };
    this.portraits = new v1.PortraitService(options.target, credentials, channel);
    this.animation = new v1.AnimationService(options.target, credentials, channel);
    this.server = new v1.ServerService(options.target, credentials, channel);
    this.token = options.token;
  }

  metadata() {
    const metadata = new grpc.Metadata();
    if (this.token) metadata.set('authorization', `Bearer ${this.token}`);
    return metadata;
  }

  /** One request, one answer. */
  unary(client, method, request, seconds = UNARY_SECONDS) {
    return new Promise((resolve, reject) => {
      const deadline = new Date(Date.now() + seconds * 1000);
      const done = (error, answer) => (error ? reject(error) : resolve(answer));
      this.call = client[method](request, this.metadata(), { deadline }, done);
    });
  }

  /** The Animate stream; `seconds` bounds its whole length. */
  animate(seconds) {
    const deadline = seconds === undefined ? undefined : new Date(Date.now() + seconds * 1000);
    this.call = this.animation.animate(this.metadata(), { deadline });
    return this.call;
  }

  /** Ends the call that runs, if one does. */
  cancel() {
    this.call?.cancel();
  }

  /** What a failed call says: its status, and the ErrorDetail of the trailing metadata where the server sent one. */
  explain(error) {
    const told = { status: grpc.status[error.code], message: error.details };
    const [bytes] = error.metadata?.get('lp-edge-error-bin') ?? [];
    return bytes ? { ...told, detail: this.types['lp_edge.v1.ErrorDetail'].deserialize(bytes) } : told;
  }

  close() {
    for (const client of [this.portraits, this.animation, this.server]) client.close();
  }
}

// -- drivers ------------------------------------------------------------------------------------------------

/** Messages for a motion that was made up: the head nods and looks around, the eyes blink every two seconds. */
async function* madeMotion(options, info) {
  const rest = info.motion.neutral; // a frontal face at rest; it goes first, so it is what counts as "no motion"
  if (!rest) throw new Error('the server tells no neutral motion');
  let blink = 0;
  for (let index = 0; index < options.count; index += 1) {
    const seconds = index / options.fps;
    const shut = Math.max(0, 1 - Math.abs((seconds % 2) - 1) / 0.12); // a blink lasts a quarter of a second
    if (shut !== blink) {
      blink = shut;
      yield { options: { edits: { blink } } };
    }
    const pitch = rest.pitch + 8 * Math.sin(2 * Math.PI * 0.7 * seconds);
    const yaw = rest.yaw + 10 * Math.sin(2 * Math.PI * 0.25 * seconds);
    yield { frame: { motion: { ...rest, pitch, yaw } } };
  }
}

/** Messages for the pictures of a folder. */
async function* pictures(folder) {
  const names = (await readdir(folder)).filter((name) => IMAGES.has(extname(name).toLowerCase())).sort();
  if (names.length === 0) throw new UsageError(`${folder} holds no JPEG, PNG or WebP`);
  for (const name of names) yield { frame: { image: { encoded: { data: await readFile(join(folder, name)) } } } };
}

// -- the stream ---------------------------------------------------------------------------------------------

/** Runs one Animate stream to its end; fills `result` on the way, so that an error leaves what there is. */
async function animate(call, config, driver, options, result) {
  const failed = new AbortController();
  const sentAt = new Map();
  const latencies = [];

  // gRPC buffers what is written; waiting for "drain" keeps the buffer short and passes the server's back-pressure on.
  const write = async (message) => {
    if (!call.write(message)) await once(call, 'drain', { signal: failed.signal });
  };

  const send = async () => {
    await write({ config });
    const begin = performance.now();
    let sequence = 0;
    for await (const message of driver) {
      if (message.frame) {
        const due = begin + (sequence * 1000) / options.fps;
        if (options.mode === 'live') await sleep(Math.max(0, due - performance.now()), undefined, { signal: failed.signal });
        sequence += 1;
        Object.assign(message.frame, { sequence, timestampUs: Math.round((sequence * 1e6) / options.fps) });
        sentAt.set(sequence, performance.now());
        result.sent += 1;
      }
      await write(message);
    }
    call.end();
  };

  const receive = async () => {
    for await (const answer of call) {
      if (answer.started) {
        result.stream_id = answer.started.streamId;
      } else if (answer.skipped) {
        sentAt.delete(answer.skipped.sequence);
        result.skipped += 1;
      } else if (answer.draining) {
        result.draining = true; // it goes on for a while; a longer stream would move to another server now
      } else if (answer.frame) {
        const { sequence, pictures: [picture], faceState, dropped, undecodable } = answer.frame;
        latencies.push(performance.now() - sentAt.get(sequence));
        sentAt.delete(sequence);
        await writeFile(join(options.out, `${String(sequence).padStart(6, '0')}.jpg`), picture.data);
        result.frames += 1;
        Object.assign(result, { dropped, undecodable });
        const state = faceState.replace('FACE_STATE_', '').toLowerCase();
        result.face_states[state] = (result.face_states[state] ?? 0) + 1;
      } // else: something that a newer server says
    }
  };

  const begin = performance.now();
  try {
    await Promise.all([receive(), send()]); // receiving first: it is who hears of errors
  } finally {
    failed.abort(); // ends the sender when the receiver failed
    call.cancel(); // ends the call when the sender failed; nothing happens when it is over
    result.seconds = round((performance.now() - begin) / 1000);
    result.latency_ms = { p50: quantile(latencies, 0.5), p99: quantile(latencies, 0.99) };
  }
}

const round = (value) => Math.round(value * 1000) / 1000;

/** Nearest rank; null without values. */
function quantile(values, share) {
  if (values.length === 0) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return round(sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]);
}

// -- the program --------------------------------------------------------------------------------------------

async function main(argv) {
  const options = readArguments(argv);
  if (options.help) {
    console.log(USAGE);
    return 0;
  }
  const picture = options.portrait && (await readFile(options.portrait));
  await mkdir(options.out, { recursive: true });
  const connection = new Connection(options, options.ca && (await readFile(options.ca)));
  const result = { sent: 0, frames: 0, dropped: 0, skipped: 0, undecodable: 0, face_states: {} };
  let id = options['portrait-id'];
  let stopped = false;
  const stop = () => {
    stopped = true;
    connection.cancel();
  };
  process.once('SIGINT', stop);
  try {
    const info = await connection.unary(connection.server, 'getServerInfo', {});
    if (picture) {
      const request = { image: { encoded: { data: picture } } };
      id = (await connection.unary(connection.portraits, 'registerPortrait', request)).portrait.id;
    }
    const config = { portraitIds: [id], mode: `STREAM_MODE_${options.mode.toUpperCase()}`, output: { encoding: 'OUTPUT_ENCODING_JPEG' } };
    const driver = options.motion ? madeMotion(options, info) : pictures(options.frames);
    if (!stopped) await animate(connection.animate(options.deadline), config, driver, options, result);
  } catch (error) {
    if (!stopped) {
      if (typeof error.code !== 'number') throw error; // not gRPC's
      console.error(JSON.stringify({ error: connection.explain(error), ...result }));
      return 1;
    }
  } finally {
    process.off('SIGINT', stop);
    // What was registered here would go by itself after its time to live; a client that is done says so.
    if (picture && id) await connection.unary(connection.portraits, 'deletePortrait', { id }, 5).catch(() => undefined);
    connection.close();
  }
  console.log(JSON.stringify({ ...result, cancelled: stopped }));
  return stopped ? 130 : 0;
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  console.error(error instanceof UsageError ? `${error.message}\n\n${USAGE}` : `client.mjs: ${error.message}`);
  process.exitCode = 2;
}
