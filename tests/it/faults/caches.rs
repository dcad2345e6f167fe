//! Faults of Redis.

use std::time::Duration;

use tokio::time::interval;

use super::catalogue::Fault;
use super::site::Site;
use crate::truth::proxy::Mode;

/// A bulk string that is longer than anybody has memory for.
const TERABYTE: &[u8] = b"$1099511627776\r\nabc";
const GARBAGE: &[u8] = b"\xff\x00HTTP/1.1 200 OK\r\n*3\r\n$-7\r\n:x\r\n";
/// Between two rounds of what is done to the entries again and again.
const AGAIN: Duration = Duration::from_millis(200);

impl Site {
    pub(super) async fn harm_redis(&mut self, fault: Fault) {
        let (redis, proxy) = (&mut self.fleet.redis, &self.fleet.redis_proxy);
        match fault {
            Fault::RedisKilled => redis.kill(),
            Fault::RedisRestarted => redis.restart().await,
            Fault::RedisFrozen => redis.freeze(),
            Fault::RedisSlow => proxy.switch(Mode::Delay(Duration::from_millis(500))),
            Fault::RedisCutsReplies => proxy.switch(Mode::Cut(3)),
            Fault::RedisGarbage => proxy.switch(Mode::Garble(GARBAGE)),
            Fault::RedisLongLength => proxy.switch(Mode::Garble(TERABYTE)),
            Fault::RedisSlowAccept => {
                proxy.switch(Mode::Refuse);
                tokio::task::yield_now().await;
                proxy.switch(Mode::Blackhole);
            }
            Fault::RedisNoClients => {
                self.on_redis(&[
                    &["CONFIG", "SET", "maxclients", "1"],
                    &["CLIENT", "KILL", "TYPE", "normal"],
                ])
                .await;
            }
            Fault::RedisFull => self.limit_redis("noeviction").await,
            Fault::RedisEvicts => self.limit_redis("allkeys-lru").await,
            Fault::RedisFlushed => self.again("return redis.call('FLUSHALL')").await,
            Fault::RedisWrongTypes => self.again(WRONG_TYPES).await,
            Fault::RedisForged => self.again(FORGE).await,
            Fault::RedisCannotSave => redis.break_saving().await,
            Fault::RedisReadOnly => self.on_redis(&[&["REPLICAOF", "127.0.0.1", "1"]]).await,
            Fault::RedisPassword => {
                let rotate: [&[&str]; 2] = [
                    &["ACL", "SETUSER", "default", "resetpass", ">another"],
                    &["CLIENT", "KILL", "TYPE", "normal"],
                ];
                self.on_redis(&rotate).await;
            }
            other => panic!("{other:?} is no fault of Redis"),
        }
    }

    pub(super) async fn heal_redis(&mut self, fault: Fault) {
        match fault {
            Fault::RedisKilled => self.fleet.redis.restart().await,
            Fault::RedisFrozen => self.fleet.redis.resume(),
            Fault::RedisNoClients => self.on_redis(&[&["CONFIG", "SET", "maxclients", "10000"]]).await,
            Fault::RedisFull | Fault::RedisEvicts => {
                self.on_redis(&[&["CONFIG", "SET", "maxmemory", "0"]]).await;
            }
            Fault::RedisCannotSave => self.fleet.redis.mend_saving().await,
            // What was left there would be in the way of the next fault.
            Fault::RedisWrongTypes | Fault::RedisForged => self.on_redis(&[&["FLUSHALL"]]).await,
            Fault::RedisReadOnly => self.on_redis(&[&["REPLICAOF", "NO", "ONE"]]).await,
            Fault::RedisPassword => self.on_redis(&[&["ACL", "SETUSER", "default", "nopass"]]).await,
            _ => {}
        }
        self.fleet.redis_proxy.switch(Mode::Pass);
        self.held.redis = None;
    }

    async fn limit_redis(&mut self, policy: &str) {
        let limit: [&[&str]; 2] =
            [&["CONFIG", "SET", "maxmemory-policy", policy], &["CONFIG", "SET", "maxmemory", "1"]];
        self.on_redis(&limit).await;
    }

    /// On a connection that is kept, because there may be no other one to be had later.
    async fn on_redis(&mut self, commands: &[&[&str]]) {
        if self.held.redis.is_none() {
            self.held.redis = Some(self.fleet.redis.connection().await.unwrap());
        }
        let connection = self.held.redis.as_mut().unwrap();
        for words in commands {
            let mut command = redis::cmd(words[0]);
            command.arg(&words[1..]);
            let answer: redis::RedisResult<redis::Value> = command.query_async(connection).await;
            let answer = answer.unwrap_or_else(|error| panic!("{words:?}: {error}"));
            assert!(!matches!(answer, redis::Value::ServerError(_)), "{words:?}: {answer:?}");
        }
    }

    /// Runs a script over and over.
    async fn again(&mut self, script: &'static str) {
        let mut connection = self.fleet.redis.connection().await.unwrap();
        let run = async move |connection: &mut redis::aio::MultiplexedConnection| {
            let mut command = redis::cmd("EVAL");
            command.arg(script).arg(0).query_async::<redis::Value>(connection).await
        };
        // Once here, so that a script that fails is heard of.
        run(&mut connection).await.unwrap();
        self.held.tasks.spawn(async move {
            let mut tick = interval(AGAIN);
            loop {
                tick.tick().await;
                let _ = run(&mut connection).await;
            }
        });
    }
}

/// Every other entry becomes a list, the others 10 MB of text.
const WRONG_TYPES: &str = "local names = redis.call('KEYS', '*')
    for at, name in ipairs(names) do
        redis.call('DEL', name)
        if at % 2 == 0 then redis.call('LPUSH', name, 'x')
        elseif at < 20 then redis.call('SETRANGE', name, 10485760, 'x') end
    end
    return #names";

/// Every entry gets the content of another one, or is cut, or has a byte changed.
const FORGE: &str = "local names = redis.call('KEYS', '*')
    local contents = {}
    for at, name in ipairs(names) do
        contents[at] = redis.call('TYPE', name).ok == 'string' and redis.call('GET', name) or ''
    end
    for at, name in ipairs(names) do
        local content = contents[at]
        if at % 3 == 0 then content = contents[at % #names + 1]
        elseif at % 3 == 1 then content = string.sub(content, 1, math.floor(#content / 2))
        else content = string.sub(content, 1, 40) .. 'x' .. string.sub(content, 42) end
        redis.call('SET', name, content)
    end
    return #names";
